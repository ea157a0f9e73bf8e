"""The public ops: which implementation runs for which tensor."""

from __future__ import annotations

from torch import Tensor

from .reference import route_scan_ref, selective_scan_ref


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan, layout (b, d, l) with grouped B and C. Arguments as in `selective_scan_ref`."""
    return selective_scan_ref(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state,
                              reverse=reverse, chunked=True)


def route_scan(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    tables: Tensor,
    select: Tensor,
    reverse: list[bool],
) -> Tensor:
    """Sum of k selective scans over the tokens of an image, each along its own route. See `route_scan_ref`."""
    return route_scan_ref(x, proj, dt_weight, dt_bias, A, D, tables, select, reverse)
