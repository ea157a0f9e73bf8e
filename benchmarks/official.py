"""The official sequence of operations of a token mixer, restated in plain PyTorch for comparison.

Channels first inside, one copy of the features a route, grouped 1x1 convolutions for the
projections, masks multiplied in, float32 in the scan. It shares the parameters of the mixer it is
made from and computes the same function for square grids whose side divides by 4 (the `release` and
`raster` orders). Only the scan itself is not restated: `scan` is any `selective_scan`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadmamba.models.quadtree import select_quadrant
from quadmamba.models.ss2d import SS2D, QuadSS2D

Scan = Callable[..., Tensor]


class OfficialMixer(nn.Module):
    """(b, h, w, c) -> the same, as the official code computes it. op: the mixer it restates."""

    def __init__(self, op: SS2D, scan: Scan) -> None:
        super().__init__()
        self.op, self.scan = op, scan

    def forward(self, x: Tensor) -> Tensor:
        op = self.op
        x = op.in_proj(x).permute(0, 3, 1, 2).contiguous()  # (b, d, h, w)
        x = F.silu(F.conv2d(x, op.conv.weight, padding=1, groups=x.shape[1]))
        y = self._quad_core(op, x) if isinstance(op, QuadSS2D) else self._raster_core(op, x)
        return op.out_proj(op.out_norm(y).to(x.dtype))

    def _raster_core(self, op: SS2D, x: Tensor) -> Tensor:
        b, d, h, w = x.shape
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        seqs = torch.stack([rows, columns], 1)
        seqs = torch.cat([seqs, seqs.flip(-1)], 1)  # (b, 4, d, l)
        ys = self._scan_routes(op, seqs)
        ys = ys[:, :2] + ys[:, 2:].flip(-1)
        y = ys[:, 0] + ys[:, 1].view(b, d, w, h).transpose(2, 3).flatten(2)
        return y.transpose(1, 2).view(b, h, w, d)

    def _quad_core(self, op: QuadSS2D, x: Tensor) -> Tensor:
        b, d, h, w = x.shape
        score = op.predictor(x.permute(0, 2, 3, 1))
        logits = F.adaptive_avg_pool2d(score[:, None], 2).flatten(1)
        decision = select_quadrant(logits, op.tau, op.training).to(x.dtype)
        mask = F.interpolate(decision.view(b, 1, 2, 2), size=(h, w), mode="nearest")
        shift = op.shift(h, w)
        x = torch.roll(x, shift, (2, 3))
        seq = _to_windows(x * mask, 4) + _to_windows(x * (1 - mask), 2)  # (b, d, l)
        ys = self._scan_routes(op, torch.stack([seq, seq.flip(-1)], 1))
        y = ys[:, 0] + ys[:, 1].flip(-1)
        y = _from_windows(y, 4, h, w) * mask + _from_windows(y, 2, h, w) * (1 - mask)
        return torch.roll(y, (-shift[0], -shift[1]), (2, 3)).permute(0, 2, 3, 1)

    def _scan_routes(self, op: SS2D, seqs: Tensor) -> Tensor:
        b, k, d, l = seqs.shape
        ssm, n = op.ssm, op.ssm.A_log.shape[-1]
        r = ssm.dt_weight.shape[-1]
        weight = ssm.x_proj_weight.reshape(-1, d, 1)
        numbers = F.conv1d(seqs.reshape(b, k * d, l), weight, groups=k).view(b, k, -1, l)
        dt, B, C = numbers.split([r, n, n], dim=2)
        weight = ssm.dt_weight.reshape(k * d, r, 1)
        delta = F.conv1d(dt.reshape(b, k * r, l), weight, groups=k)
        wide = torch.promote_types(seqs.dtype, torch.float32)
        u, delta, B, C = (t.contiguous().to(wide) for t in (seqs.reshape(b, k * d, l), delta, B, C))
        A = -torch.exp(ssm.A_log).flatten(0, 1)
        D, bias = ssm.D.flatten(), ssm.dt_bias.flatten()
        y = self.scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
        return y.view(b, k, d, l)


def _to_windows(x: Tensor, side: int) -> Tensor:
    """Window after window of a side x side partition: (b, d, h, w) -> (b, d, l)."""
    b, d, h, w = x.shape
    x = x.view(b, d, side, h // side, side, w // side)
    return x.permute(0, 1, 2, 4, 3, 5).reshape(b, d, h * w)


def _from_windows(x: Tensor, side: int, h: int, w: int) -> Tensor:
    """Inverse of `_to_windows`: (b, d, l) -> (b, d, h, w)."""
    b, d, _ = x.shape
    x = x.view(b, d, side, side, h // side, w // side)
    return x.permute(0, 1, 2, 4, 3, 5).reshape(b, d, h, w)
