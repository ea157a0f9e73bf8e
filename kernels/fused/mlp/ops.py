"""`mlp` as torch.library ops: cuBLAS and Triton for CUDA tensors, the reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.casts import cast
from quadmamba.kernels.fused.launch import (
    check_half_or_single,
    compute_dtype,
    empty_rows,
    product_float32,
    triton_kernels,
)
from quadmamba.kernels.fused.mlp.reference import check_mlp, mlp_values_ref

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_ONCE = "mlp: expected a first derivative only, got a second one; use mlp_ref for that"


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """weight2 gelu(weight1 x + bias1) + bias2, (..., c) to (..., c2).

    weight1: (m, c), bias1: (m), weight2: (c2, m), bias2: (c2), of one dtype. Computed and returned
    in the dtype of autocast where it is on, else in that of x; the GELU is the exact one.
    Backward keeps x and the hidden values before the GELU and computes the GELU anew. The gradients
    of weights and biases are sums in float32, rounded to their dtype alone. Runs are bit-equal.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_mlp(x, weight1, bias1, weight2, bias2)
    x, params = x.to(compute_dtype(x)), (weight1, bias1, weight2, bias2)
    return _mlp(x, *params, *[cast(param, x.dtype) for param in params])[0]


@triton_op("quadmamba::mlp")
def _mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight1_copy: Tensor,
    bias1_copy: Tensor,
    weight2_copy: Tensor,
    bias2_copy: Tensor,
) -> tuple[Tensor, Tensor]:
    check_half_or_single("mlp", x)
    kernels = triton_kernels(__package__)
    hidden = F.linear(x.reshape(-1, x.shape[-1]), weight1_copy, bias1_copy)
    y = F.linear(kernels.gelu(hidden), weight2_copy, bias2_copy)
    return y.view(*x.shape[:-1], y.shape[1]), hidden.view(*x.shape[:-1], hidden.shape[1])


@_mlp.register_kernel("cpu")
def _mlp_cpu(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight1_copy: Tensor,
    bias1_copy: Tensor,
    weight2_copy: Tensor,
    bias2_copy: Tensor,
) -> tuple[Tensor, Tensor]:
    return mlp_values_ref(x, weight1_copy, bias1_copy, weight2_copy, bias2_copy)


@_mlp.register_fake
def _mlp_fake(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight1_copy: Tensor,
    bias1_copy: Tensor,
    weight2_copy: Tensor,
    bias2_copy: Tensor,
) -> tuple[Tensor, Tensor]:
    check_mlp(x, weight1, bias1, weight2, bias2)
    sides = (bias2.shape[0], bias1.shape[0])
    y, hidden = (x.new_empty((*x.shape[:-1], side)) for side in sides)
    return y, hidden


@triton_op("quadmamba::mlp_backward")
def _mlp_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    dtype: torch.dtype,
) -> Grads:
    check_half_or_single("mlp", grad, x)
    kernels = triton_kernels(__package__)
    tokens, rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).contiguous()
    before = hidden.reshape(-1, hidden.shape[-1])
    grad_hidden = rows @ weight2
    active, grad_bias1 = kernels.gelu_backward_(grad_hidden, before)
    grad_weight2 = product_float32(rows.t(), active)
    del active
    grads = product_float32(grad_hidden.t(), tokens), grad_bias1
    grads = *grads, grad_weight2, kernels.sum_rows(rows)
    grad_x = (grad_hidden @ weight1).view(x.shape)
    return grad_x, *(g.to(dtype) for g in grads)


@_mlp_backward.register_kernel("cpu")
def _mlp_backward_cpu(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    dtype: torch.dtype,
) -> Grads:
    tokens, rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    before = hidden.reshape(-1, hidden.shape[-1])
    grad_hidden = torch.ops.aten.gelu_backward(rows @ weight2, before)
    products = grad_hidden.t() @ tokens, rows.t() @ F.gelu(before)
    sums = grad_hidden.sum(0), rows.sum(0)
    grads = products[0], sums[0], products[1], sums[1]
    grad_x = (grad_hidden @ weight1).view(x.shape)
    return grad_x, *(g.to(dtype) for g in grads)


@_mlp_backward.register_fake
def _mlp_backward_fake(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    dtype: torch.dtype,
) -> Grads:
    sides = hidden.shape[-1], grad.shape[-1]
    bias1, bias2 = (x.new_empty(side, dtype=dtype) for side in sides)
    return empty_rows(x), empty_rows(weight1, dtype), bias1, empty_rows(weight2, dtype), bias2


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight1, _, _, _, weight1_copy, _, weight2_copy, _ = inputs
    ctx.dtype = weight1.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight1_copy, weight2_copy)


def _autograd(ctx: Any, grad: Tensor | None, grad_hidden: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    grads = _mlp_backward(grad, *ctx.saved_tensors, ctx.dtype)
    if torch.is_grad_enabled():  # the copies are no part of a graph: a second derivative is refused
        refuse = torch._C._functions.DelayedError(_ONCE, len(grads))
        grads = refuse(*(g.detach().requires_grad_() for g in grads))
    return *grads, None, None, None, None


_mlp.register_autograd(_autograd, setup_context=_save)


@register_flop_formula(torch.ops.quadmamba.mlp)
def _flops(
    x_shape: Sequence[int],
    weight1_shape: Sequence[int],
    bias1_shape: Sequence[int],
    weight2_shape: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Two operations a multiply-add of both layers, torch's convention."""
    return 2 * math.prod(x_shape[:-1]) * (math.prod(weight1_shape) + math.prod(weight2_shape))


@register_flop_formula(torch.ops.quadmamba.mlp_backward)
def _flops_backward(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    hidden_shape: Sequence[int],
    weight1_shape: Sequence[int],
    weight2_shape: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """The gradients of both layers' inputs and weights."""
    return 2 * _flops(x_shape, weight1_shape, (), weight2_shape)
