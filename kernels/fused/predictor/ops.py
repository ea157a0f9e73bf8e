"""`predictor_score` as torch.library ops: Triton for CUDA tensors, the reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quadmamba.kernels.dispatch import Kernel, triton_op
from quadmamba.kernels.fused.launch import (
    check_half_or_single,
    compute_dtype,
    empty_rows,
    triton_kernels,
)
from quadmamba.kernels.fused.predictor.reference import (
    check_predictor,
    empty_kept,
    predictor_grad_ref,
    predictor_score_ref,
)


def predictor_score(x: Tensor, params: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Score of each token, (..., d) to (...), float32 (float64 for float64 x).

    params: norm weight and bias, then weight and bias of four linear layers d -> d -> d2 -> d4
    -> 2, in the order in which a predictor's modules list them. Matrices are multiplied in
    autocast's dtype where it is on, else in that of x, with float32 sums. Runs are bit-equal.
    Backward keeps x and params; on CUDA half precision takes Triton and keeps the layers before
    their GELU too, in the dtype of x, where a gradient is wanted. float32 takes the reference.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_predictor(x, params)
    params = list(params)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params))
    return _predictor_score(x.to(compute_dtype(x)), params, eps, keep)[0]


def _takes_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _rows(x: Tensor) -> Tensor:
    """Tokens (rows, d), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


@triton_op("quadmamba::predictor_score")
def _predictor_score(
    x: Tensor, params: list[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    check_half_or_single("predictor_score", x)
    if not _takes_triton(x):
        return predictor_score_ref(x, params, eps).contiguous(), []
    kernels = triton_kernels(__package__, "host")
    score, kept = kernels.forward(_rows(x), params, eps, keep)
    return score.view(x.shape[:-1]), kept


@_predictor_score.register_kernel("cpu")
def _predictor_score_cpu(
    x: Tensor, params: list[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    return predictor_score_ref(x, params, eps).contiguous(), []


@_predictor_score.register_fake
def _predictor_score_fake(
    x: Tensor, params: list[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    check_predictor(x, params)
    score = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return score, empty_kept(x, params) if keep and _takes_triton(x) else []


@triton_op("quadmamba::predictor_score_backward")
def _predictor_score_backward(
    grad: Tensor, x: Tensor, kept: list[Tensor], params: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    check_half_or_single("predictor_score", x)
    if not _takes_triton(x):
        return predictor_grad_ref(grad, x, params, eps)
    kernels = triton_kernels(__package__, "host")
    grad_x, grads = kernels.backward(grad.reshape(-1).contiguous(), _rows(x), kept, params)
    return grad_x.view(x.shape), grads


@_predictor_score_backward.register_kernel("cpu")
def _predictor_score_backward_cpu(
    grad: Tensor, x: Tensor, kept: list[Tensor], params: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    return predictor_grad_ref(grad, x, params, eps)


@_predictor_score_backward.register_fake
def _predictor_score_backward_fake(
    grad: Tensor, x: Tensor, kept: list[Tensor], params: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    return empty_rows(x), [torch.empty_like(p) for p in params]


def _add_cuda(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    kept: list[Tensor],
    params: list[Tensor],
    eps: float,
) -> list[Tensor]:
    if not _takes_triton(x):
        return _add_plain(total, grad, x, kept, params, eps)
    kernels = triton_kernels(__package__, "host")
    rows = grad.reshape(-1).contiguous(), _rows(x)
    return kernels.backward(*rows, kept, params, total.view(rows[1].shape))[1]


def _add_plain(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    kept: list[Tensor],
    params: list[Tensor],
    eps: float,
) -> list[Tensor]:
    del kept
    grad_x, grads = predictor_grad_ref(grad, x, params, eps)
    total += grad_x
    return grads


# By device type, the gradient as its op gives it, but that of x is added to `total`, a contiguous
# tensor like x: (total, grad, x, kept, params, eps) -> the gradients of the params.
ADD_BACKWARD: dict[str, Kernel] = {"cpu": _add_plain, "cuda": _add_cuda}


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, params, ctx.eps, _ = inputs
    kept = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.count = len(kept)
    ctx.save_for_backward(x, *kept, *params)


def _autograd(
    ctx: Any, grad: Tensor | None, _: Any
) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    x, *rest = ctx.saved_tensors
    kept, params = rest[: ctx.count], rest[ctx.count :]
    if grad is None:
        return None, [None] * len(params), None, None
    grad_x, grads = _predictor_score_backward(grad, x, kept, params, ctx.eps)
    return grad_x, grads, None, None


_predictor_score.register_autograd(_autograd, setup_context=_save_inputs)


@register_flop_formula(torch.ops.quadmamba.predictor_score)
def _flops(
    x_shape: Sequence[int],
    params_shape: Sequence[Sequence[int]],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Two operations a multiply-add of the four linear layers, torch's convention."""
    tokens = math.prod(x_shape[:-1])
    return 2 * tokens * sum(math.prod(shape) for shape in params_shape[2::2])


@register_flop_formula(torch.ops.quadmamba.predictor_score_backward)
def _flops_backward(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    kept_shape: object,
    params_shape: Sequence[Sequence[int]],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Gradients of the layers' inputs and matrices; what is computed anew is not counted."""
    return 2 * _flops(x_shape, params_shape)
