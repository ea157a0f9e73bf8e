"""A token mixer by its definition: PyTorch's own ops and the references of the kernels, no more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadmamba.kernels import selective_scan
from quadmamba.kernels.quadtree_gather import gather_in_ref, gather_out_ref
from quadmamba.models.orders import QuadMaps, cross_routes
from quadmamba.models.quadtree import QuadPredictor, quadrant_logits, select_quadrant
from quadmamba.models.ss2d import SS2D, QuadSS2D


class PlainMixer(nn.Module):
    """(b, h, w, c) -> the same, as `op` defines it. It has the parameters of `op`."""

    def __init__(self, op: SS2D) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        op = self.op
        x = F.linear(x, op.in_proj.weight).permute(0, 3, 1, 2)  # (b, d, h, w)
        x = F.silu(F.conv2d(x, op.conv.weight, padding=1, groups=x.shape[1])).permute(0, 2, 3, 1)
        rows = F.linear(x, op.ssm.x_proj_weight.flatten(0, 1))
        proj = rows.unflatten(-1, op.ssm.x_proj_weight.shape[:2]).flatten(1, 2)  # (b, l, k, r + 2n)
        y = _quad_core(op, x, proj) if isinstance(op, QuadSS2D) else _raster_core(op, x, proj)
        return F.linear(nn.LayerNorm.forward(op.out_norm, y.view(x.shape)), op.out_proj.weight)


def _raster_core(op: SS2D, x: Tensor, proj: Tensor) -> Tensor:
    tables = op.order.tables(x.shape[1], x.shape[2], x.device)
    index = (tables, cross_routes(x.device), op.reverse)
    y = selective_scan.route_scan_ref(x.flatten(1, 2), proj, *op.ssm.weights(), *index)
    return y.to(x.dtype)


def _quad_core(op: QuadSS2D, x: Tensor, proj: Tensor) -> Tensor:
    h, w = x.shape[1:3]
    maps = op.order.maps(h, w, op.shift(h, w), x.device)
    decision = _decide(op, x, maps)
    index = (decision, maps.fine, maps.coarse, maps.quadrant)
    tokens, numbers = gather_in_ref(x.flatten(1, 2), *index), gather_in_ref(proj.flatten(2), *index)
    straight = torch.arange(h * w, dtype=torch.int32, device=x.device)[None]
    route = (straight, straight.new_zeros(1, 1), op.reverse)
    numbers = numbers.view(proj.shape)
    y = selective_scan.route_scan_ref(tokens, numbers, *op.ssm.weights(), *route)
    return gather_out_ref(y.to(x.dtype), *index)


def _decide(op: QuadSS2D, x: Tensor, maps: QuadMaps) -> Tensor:
    if op.predictor is None:
        return op.select(x)
    logits = quadrant_logits(_score(op.predictor, x), maps)
    return select_quadrant(logits, op.tau, op.training, op.gumbel)


def _score(predictor: QuadPredictor, x: Tensor) -> Tensor:
    x = nn.LayerNorm.forward(predictor.embed[0], x)
    for layer in (*predictor.embed[1:], *predictor.score):
        x = layer(x)
    return x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)[..., 0]
