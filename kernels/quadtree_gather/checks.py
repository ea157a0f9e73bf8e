"""Argument checks shared by the reference and the kernels of the quadtree gather."""

from __future__ import annotations

from torch import Tensor


def check_gather(x: Tensor, decision: Tensor, fine: Tensor, coarse: Tensor, quadrant: Tensor) -> None:
    """Raise ValueError unless x is (b, l, d), decision (b, 4) and the three maps are integer (l)."""
    if x.dim() != 3:
        raise ValueError(f"quadtree_gather: expected tokens of shape (b, l, d), got {tuple(x.shape)}")
    b, l, _ = x.shape
    if tuple(decision.shape) != (b, 4):
        raise ValueError(f"quadtree_gather: expected decision of shape (b, 4) = ({b}, 4), got {tuple(decision.shape)}")
    for name, index in (("fine", fine), ("coarse", coarse), ("quadrant", quadrant)):
        if tuple(index.shape) != (l,) or index.is_floating_point():
            raise ValueError(f"quadtree_gather: expected {name} as {l} integers, got {index.dtype} {tuple(index.shape)}")
