"""`predictor_score` as torch.library ops: Triton for CUDA tensors, the reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.launch import (
    check_half_or_single,
    compute_dtype,
    empty_rows,
    triton_kernels,
)
from quadmamba.kernels.fused.predictor.reference import (
    check_predictor,
    predictor_grad_ref,
    predictor_score_ref,
)

# Widest tokens that the Triton kernels take. At 384 their registers spill, which costs what cuBLAS
# costs, and on an H200 with Triton 3.6 the float16 result was wrong.
MAX_D = 256


def predictor_score(x: Tensor, params: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Score of each token, (..., d) to (...), float32 (float64 for float64 x).

    params: norm weight and bias, then weight and bias of four linear layers d -> d -> d2 -> d4
    -> 2, in the order in which a predictor's modules list them. Matrices are multiplied in
    autocast's dtype where it is on, else in that of x, with float32 sums.
    Backward keeps x and params alone. On CUDA half precision with d <= 256 takes Triton, the rest
    the reference, whose time is cuBLAS's.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_predictor(x, params)
    return _predictor_score(x.to(compute_dtype(x)), list(params), eps)


def _takes_triton(x: Tensor) -> bool:
    return x.dtype != torch.float32 and x.shape[-1] <= MAX_D


@triton_op("quadmamba::predictor_score")
def _predictor_score(x: Tensor, params: list[Tensor], eps: float) -> Tensor:
    check_half_or_single("predictor_score", x)
    if not _takes_triton(x):
        return predictor_score_ref(x, params, eps).contiguous()
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    return triton_kernels(__package__, "host").forward(tokens, params, eps).view(x.shape[:-1])


@_predictor_score.register_kernel("cpu")
def _predictor_score_cpu(x: Tensor, params: list[Tensor], eps: float) -> Tensor:
    return predictor_score_ref(x, params, eps).contiguous()


@_predictor_score.register_fake
def _predictor_score_fake(x: Tensor, params: list[Tensor], eps: float) -> Tensor:
    check_predictor(x, params)
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@triton_op("quadmamba::predictor_score_backward")
def _predictor_score_backward(
    grad: Tensor, x: Tensor, params: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    check_half_or_single("predictor_score", x)
    if not _takes_triton(x):
        return predictor_grad_ref(grad, x, params, eps)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    kernels = triton_kernels(__package__, "host")
    grad_x, grads = kernels.backward(grad.reshape(-1).contiguous(), tokens, params, eps)
    return grad_x.view(x.shape), grads


@_predictor_score_backward.register_kernel("cpu")
def _predictor_score_backward_cpu(
    grad: Tensor, x: Tensor, params: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    return predictor_grad_ref(grad, x, params, eps)


@_predictor_score_backward.register_fake
def _predictor_score_backward_fake(
    grad: Tensor, x: Tensor, params: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    return empty_rows(x), [torch.empty_like(p) for p in params]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, params, ctx.eps = inputs
    ctx.save_for_backward(x, *params)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor], None]:
    x, *params = ctx.saved_tensors
    grad_x, grads = _predictor_score_backward(grad, x, params, ctx.eps)
    return grad_x, grads, None


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
    params_shape: Sequence[Sequence[int]],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Gradients of the layers' inputs and matrices; what is computed anew is not counted."""
    return 2 * _flops(x_shape, params_shape)
