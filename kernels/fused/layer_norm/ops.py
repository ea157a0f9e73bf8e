"""The LayerNorms as torch.library ops: Triton for CUDA tensors, the reference for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.launch import (
    check_half_or_single,
    compute_dtype,
    empty_rows,
    triton_kernels,
)
from quadmamba.kernels.fused.layer_norm.reference import (
    add_layer_norm_ref,
    check_add,
    check_layer_norm,
    layer_norm_grad_ref,
    layer_norm_ref,
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm of x (..., d) over d, computed in float32; weight, bias: (d).

    out_dtype: dtype of the result, by default that of autocast where it is on, else that of x.
    Backward keeps x alone. Runs are bit-equal. Raises ValueError for shapes or dtypes that do not
    fit, RuntimeError on CUDA without Triton.
    """
    check_layer_norm(x, weight, bias)
    return _layer_norm(x, weight, bias, eps, out_dtype or compute_dtype(x))


def add_layer_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, norm(total)) with total = residual + scale · x, in one pass.

    residual, x: (b, ..., d); total has the dtype of residual. scale: (b), a constant factor per
    sample (drop path), or None. weight, bias, eps, out_dtype, errors: as in `layer_norm`, of x.
    Backward keeps the total alone.
    """
    check_add(residual, x, scale)
    check_layer_norm(x, weight, bias)
    return _add_layer_norm(residual, x, weight, bias, scale, eps, out_dtype or compute_dtype(x))


@triton_op("quadmamba::layer_norm")
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    check_half_or_single("layer_norm", x)
    kernels = triton_kernels(__package__)
    return kernels.forward(x.contiguous(), weight.contiguous(), bias.contiguous(), eps, out_dtype)[
        1
    ]


@_layer_norm.register_kernel("cpu")
def _layer_norm_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    return layer_norm_ref(x, weight, bias, eps, out_dtype).contiguous()


@_layer_norm.register_fake
def _layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    check_layer_norm(x, weight, bias)
    return empty_rows(x, out_dtype)


@triton_op("quadmamba::layer_norm_backward")
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    check_half_or_single("layer_norm", grad, x)
    kernels = triton_kernels(__package__)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    return kernels.backward(grad, x, weight, eps, x.dtype)[1:]


@_layer_norm_backward.register_kernel("cpu")
def _layer_norm_backward_cpu(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    grad_x, *grad_params = layer_norm_grad_ref(grad, x, weight, eps)
    return grad_x.view(x.shape).to(x.dtype, copy=True), torch.stack(grad_params).to(weight.dtype)


@_layer_norm_backward.register_fake
def _layer_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return empty_rows(x), weight.new_empty((2, *weight.shape))


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def _layer_norm_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_params = _layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    grad_weight, grad_bias = grad_params.unbind()
    return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), None, None


_layer_norm.register_autograd(_layer_norm_autograd, setup_context=_save_layer_norm)


@triton_op("quadmamba::add_layer_norm")
def _add_layer_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    check_half_or_single("add_layer_norm", residual, x)
    scale = None if scale is None else scale.contiguous()
    params = weight.contiguous(), bias.contiguous()
    kernels = triton_kernels(__package__)
    return kernels.forward(x.contiguous(), *params, eps, out_dtype, residual.contiguous(), scale)


@_add_layer_norm.register_kernel("cpu")
def _add_layer_norm_cpu(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total, normed = add_layer_norm_ref(residual, x, weight, bias, scale, eps, out_dtype)
    return total.contiguous(), normed.contiguous()


@_add_layer_norm.register_fake
def _add_layer_norm_fake(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    check_add(residual, x, scale)
    check_layer_norm(x, weight, bias)
    return empty_rows(residual), empty_rows(x, out_dtype)


@triton_op("quadmamba::add_layer_norm_backward")
def _add_layer_norm_backward(
    grad_total: Tensor,
    grad: Tensor,
    total: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    check_half_or_single("add_layer_norm", grad_total, grad, total)
    scale = None if scale is None else scale.contiguous()
    grad, total, weight = grad.contiguous(), total.contiguous(), weight.contiguous()
    kernels = triton_kernels(__package__)
    return kernels.backward(grad, total, weight, eps, x_dtype, grad_total.contiguous(), scale)


@_add_layer_norm_backward.register_kernel("cpu")
def _add_layer_norm_backward_cpu(
    grad_total: Tensor,
    grad: Tensor,
    total: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_sum, *grad_params = layer_norm_grad_ref(grad, total, weight, eps)
    grad_sum = grad_sum.view(total.shape) + grad_total
    grad_x = grad_sum if scale is None else grad_sum * scale.view(-1, *[1] * (total.dim() - 1))
    grads = grad_sum.to(total.dtype), grad_x.to(x_dtype, copy=True)
    return *grads, torch.stack(grad_params).to(weight.dtype)


@_add_layer_norm_backward.register_fake
def _add_layer_norm_backward_fake(
    grad_total: Tensor,
    grad: Tensor,
    total: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = empty_rows(total), empty_rows(total, x_dtype)
    return *grads, weight.new_empty((2, *weight.shape))


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, weight, bias, scale, ctx.eps, _ = inputs
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype
    ctx.save_for_backward(output[0], weight, scale)


def _add_layer_norm_autograd(
    ctx: Any, grad_total: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    total, weight, scale = ctx.saved_tensors
    grad_residual, grad_x, grad_params = _add_layer_norm_backward(
        grad_total, grad, total, weight, scale, ctx.eps, ctx.x_dtype
    )
    grad_weight, grad_bias = grad_params.unbind()
    return grad_residual, grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), None, None, None


_add_layer_norm.register_autograd(_add_layer_norm_autograd, setup_context=_save_add_layer_norm)
