"""The quadtree scan by its definition: gather the sequence, scan it both ways, gather back."""

from __future__ import annotations

import torch
from torch import Tensor

from quadmamba.kernels import selective_scan
from quadmamba.kernels.quadtree_gather import gather_in, gather_out

REVERSE = [False, True]


def quadtree_scan_ref(
    x: Tensor,
    proj: Tensor,
    decision: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    maps: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Tokens (b, l, d) -> (b, l, d) by way of the sequence. Arguments as in `quadtree_scan`."""
    index = (decision, *maps)
    seq = gather_in(x, *index)
    seq_proj = gather_in(proj.flatten(2), *index).view(proj.shape)
    straight = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[None]
    select = torch.zeros(1, 2, dtype=torch.int32, device=x.device)
    y = selective_scan.route_scan(seq, seq_proj, *parameters, straight, select, REVERSE)
    return gather_out(y.to(x.dtype), *index)
