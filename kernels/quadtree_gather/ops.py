"""The quadtree gather as torch.library ops: Triton for CUDA tensors, the reference on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.launch import triton_kernels
from quadmamba.kernels.quadtree_gather.checks import check_decision_grad, check_gather
from quadmamba.kernels.quadtree_gather.reference import (
    decision_grad_ref,
    gather_in_ref,
    gather_out_ref,
    quadrant_sums,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def invert_maps(fine: Tensor, coarse: Tensor) -> Tensor:
    """The token at each position: (2, l) int32, row 0 the inverse of fine, row 1 of coarse.

    fine, coarse: (l) integer, each a permutation of the positions.
    """
    maps = torch.stack([fine, coarse]).long()
    tokens = torch.arange(maps.shape[1], dtype=torch.int32, device=maps.device)
    return torch.zeros_like(maps, dtype=torch.int32).scatter_(1, maps, tokens.expand(2, -1))


def gather_in(
    x: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor | None = None,
) -> Tensor:
    """Tokens to the quadtree sequence, (b, l, d) to (b, l, d), differentiable in x and decision.

    decision: (b, 4) of any real values; one-hot is the fast case: rows of weight 0 are not read.
    fine, coarse, quadrant: (l) integer; fine and coarse are permutations (not checked).
    inverse: `invert_maps(fine, coarse)`, which a caller with fixed maps computes once.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_gather(x, decision, fine, coarse, quadrant)
    inverse = invert_maps(fine, coarse) if inverse is None else inverse
    return _gather(x, decision, _int32(fine), _int32(coarse), _int32(quadrant), inverse, True)


def gather_out(
    y: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor | None = None,
) -> Tensor:
    """The quadtree sequence back to tokens, (b, l, d) to (b, l, d). Arguments as in `gather_in`."""
    check_gather(y, decision, fine, coarse, quadrant)
    inverse = invert_maps(fine, coarse) if inverse is None else inverse
    return _gather(y, decision, _int32(fine), _int32(coarse), _int32(quadrant), inverse, False)


def decision_grad(
    pairs: Sequence[tuple[Tensor, Tensor]],
    choice: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> Tensor:
    """Gradient of the decision, (b, 4) float32, where no quadtree sequence was ever written.

    For a nested order and a one-hot decision the sequence is a permutation of the tokens, so a scan
    may read and write tokens through tables. The decision's gradient is then, with T[p] the token
    at position p of the image's order,

        d decision[q] = sum over pairs (v, w) and tokens t in q of
                        v(t) · (w(T[P_fine(t)]) - w(T[P_coarse(t)]))

    pairs: tensors (b, l, ·) in token order, (x, gradient of x) for each input of the scan and
    (gradient of y, y) for its output. choice: (b), the selected quadrant. tables: (4, l), row q
    lists T for that choice. fine, coarse, quadrant: (l). All indices integer. Not differentiable.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_decision_grad(pairs, choice, tables, fine, coarse, quadrant)
    values, gathered = [v for v, _ in pairs], [w for _, w in pairs]
    maps = (_int32(m) for m in (choice, tables, fine, coarse, quadrant))
    return _decision_grad(values, gathered, *maps)


def _int32(index: Tensor) -> Tensor:
    return index.to(torch.int32).contiguous()


def _check_dtype(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                "quadtree_gather: expected float16, bfloat16 or float32 on CUDA, "
                f"got {tensor.dtype}"
            )


@triton_op("quadmamba::quadtree_gather")
def _gather(
    src: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor,
    inward: bool,
) -> Tensor:
    if src.dtype == torch.float64:
        return _gather_cpu(src, decision, fine, coarse, quadrant, inverse, inward)
    _check_dtype(src)
    first, second = inverse if inward else (fine, coarse)
    kernels = triton_kernels(__package__)
    return kernels.two_source(
        src.contiguous(), decision, first, second, quadrant, tokens=not inward
    )[0]


@_gather.register_kernel("cpu")
def _gather_cpu(
    src: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor,
    inward: bool,
) -> Tensor:
    ref = gather_in_ref if inward else gather_out_ref
    return ref(src, decision, fine, coarse, quadrant)


@_gather.register_fake
def _gather_fake(
    src: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor,
    inward: bool,
) -> Tensor:
    check_gather(src, decision, fine, coarse, quadrant)
    return torch.empty_like(src, memory_format=torch.contiguous_format)


@triton_op("quadmamba::quadtree_gather_backward")
def _gather_backward(
    grad: Tensor,
    src: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor,
    inward: bool,
) -> tuple[Tensor, Tensor]:
    if src.dtype == torch.float64:
        maps = (fine, coarse, quadrant, inverse)
        return _gather_backward_cpu(grad, src, decision, *maps, inward)
    _check_dtype(grad, src)
    first, second = (fine, coarse) if inward else inverse
    kernels = triton_kernels(__package__)
    return kernels.two_source(
        grad.contiguous(), decision, first, second, quadrant, tokens=inward, other=src.contiguous()
    )


@_gather_backward.register_kernel("cpu")
def _gather_backward_cpu(
    grad: Tensor,
    src: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor,
    inward: bool,
) -> tuple[Tensor, Tensor]:
    adjoint = gather_out_ref if inward else gather_in_ref
    tokens, seq = (src, grad) if inward else (grad, src)
    sums = quadrant_sums(tokens, seq, fine, coarse, quadrant)
    return adjoint(grad, decision, fine, coarse, quadrant), sums


@_gather_backward.register_fake
def _gather_backward_fake(
    grad: Tensor,
    src: Tensor,
    decision: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
    inverse: Tensor,
    inward: bool,
) -> tuple[Tensor, Tensor]:
    sums = torch.promote_types(grad.dtype, torch.float32)
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return out, decision.new_empty(decision.shape, dtype=sums)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    src, *maps, ctx.inward = inputs
    ctx.save_for_backward(src if ctx.needs_input_grad[1] else None, *maps)


def _gather_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    src, decision, *maps = ctx.saved_tensors
    if src is None:
        return (_gather(grad, decision, *maps, not ctx.inward), *([None] * 6))
    grad_src, sums = _gather_backward(grad, src, decision, *maps, ctx.inward)
    return (grad_src, sums.to(decision.dtype), *([None] * 5))


_gather.register_autograd(_gather_autograd, setup_context=_save_inputs)


@triton_op("quadmamba::quadtree_decision_grad")
def _decision_grad(
    values: list[Tensor],
    gathered: list[Tensor],
    choice: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> Tensor:
    _check_dtype(*values, *gathered)
    values, gathered = ([t.contiguous() for t in ts] for ts in (values, gathered))
    kernels = triton_kernels(__package__)
    return kernels.decision_grad(values, gathered, choice, tables, fine, coarse, quadrant)


@_decision_grad.register_kernel("cpu")
def _decision_grad_cpu(
    values: list[Tensor],
    gathered: list[Tensor],
    choice: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> Tensor:
    pairs = list(zip(values, gathered))
    return decision_grad_ref(pairs, choice, tables, fine, coarse, quadrant)


@_decision_grad.register_fake
def _decision_grad_fake(
    values: list[Tensor],
    gathered: list[Tensor],
    choice: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> Tensor:
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return values[0].new_empty((choice.shape[0], 4), dtype=dtype)
