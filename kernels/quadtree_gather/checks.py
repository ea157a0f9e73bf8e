"""Argument checks shared by the reference and the kernels of the quadtree gather."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

OP = "quadtree_gather"


def _check_index(name: str, index: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(index.shape) != shape or index.is_floating_point():
        raise ValueError(
            f"{OP}: expected {name} as integers of shape {shape}, "
            f"got {index.dtype} {tuple(index.shape)}"
        )


def _check_tokens(name: str, x: Tensor) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"{OP}: expected floating {name} of shape (b, l, d), got {x.dtype} {tuple(x.shape)}"
        )


def check_gather(
    x: Tensor, decision: Tensor, fine: Tensor, coarse: Tensor, quadrant: Tensor
) -> None:
    """Raise ValueError unless x is (b, l, d), decision (b, 4) and the maps are integers (l)."""
    _check_tokens("tokens", x)
    b, l, _ = x.shape
    if tuple(decision.shape) != (b, 4) or not decision.is_floating_point():
        raise ValueError(
            f"{OP}: expected floating decision of shape (b, 4) = ({b}, 4), "
            f"got {decision.dtype} {tuple(decision.shape)}"
        )
    for name, index in (("fine", fine), ("coarse", coarse), ("quadrant", quadrant)):
        _check_index(name, index, (l,))
    devices = {t.device for t in (x, decision, fine, coarse, quadrant)}
    if len(devices) > 1:
        raise ValueError(
            f"{OP}: expected all tensors on one device, got {sorted(map(str, devices))}"
        )


def check_decision_grad(
    pairs: Sequence[tuple[Tensor, Tensor]],
    choice: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> None:
    """Raise ValueError unless the pairs are (b, l, ·) of equal shapes and the tables fit them."""
    if not pairs:
        raise ValueError(f"{OP}: expected at least one pair (tokens, gathered), got none")
    b, l = choice.shape[0] if choice.dim() else -1, fine.shape[0] if fine.dim() else -1
    for i, (tokens, gathered) in enumerate(pairs):
        _check_tokens(f"pairs[{i}]", tokens)
        if tokens.shape != gathered.shape or tuple(tokens.shape[:2]) != (b, l):
            raise ValueError(
                f"{OP}: expected pairs[{i}] as two tensors of one shape ({b}, {l}, d), "
                f"got {tuple(tokens.shape)} and {tuple(gathered.shape)}"
            )
    _check_index("choice", choice, (b,))
    _check_index("tables", tables, (4, l))
    for name, index in (("fine", fine), ("coarse", coarse), ("quadrant", quadrant)):
        _check_index(name, index, (l,))
