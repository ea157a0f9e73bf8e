"""`bias_norm` as torch.library ops: Triton for CUDA tensors, the reference for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.bias_norm.reference import (
    bias_norm_grad_ref,
    bias_norm_ref,
    check_bias_norm,
)
from quadmamba.kernels.fused.launch import (
    check_half_or_single,
    compute_dtype,
    empty_rows,
    triton_kernels,
)


def bias_norm(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool = False,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm of x + bias over d, x (..., d), computed in float32; with `gelu` its GELU.

    bias, weight, shift: (d), of one dtype. out_dtype: dtype of the result, by default that of
    autocast where it is on, else that of x. For a convolution without its own bias, whose output
    then is read and written once less each way. Backward keeps x alone. Runs are bit-equal. Raises
    ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_bias_norm(x, bias, weight, shift)
    return _bias_norm(x, bias, weight, shift, gelu, eps, out_dtype or compute_dtype(x))


@triton_op("quadmamba::bias_norm")
def _bias_norm(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    check_half_or_single("bias_norm", x)
    params = bias.contiguous(), weight.contiguous(), shift.contiguous()
    return triton_kernels(__package__).forward(x.contiguous(), *params, gelu, eps, out_dtype)


@_bias_norm.register_kernel("cpu")
def _bias_norm_cpu(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    return bias_norm_ref(x, bias, weight, shift, gelu, eps, out_dtype).contiguous()


@_bias_norm.register_fake
def _bias_norm_fake(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    check_bias_norm(x, bias, weight, shift)
    return empty_rows(x, out_dtype)


@triton_op("quadmamba::bias_norm_backward")
def _bias_norm_backward(
    grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, gelu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    check_half_or_single("bias_norm", grad, x)
    params = bias.contiguous(), weight.contiguous(), shift.contiguous()
    kernels = triton_kernels(__package__)
    return kernels.backward(grad.contiguous(), x.contiguous(), *params, gelu, eps)


@_bias_norm_backward.register_kernel("cpu")
def _bias_norm_backward_cpu(
    grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, gelu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    grad_x, *grads = bias_norm_grad_ref(grad, x, bias, weight, shift, gelu, eps)
    return grad_x.to(x.dtype, copy=True), torch.stack(grads).to(weight.dtype)


@_bias_norm_backward.register_fake
def _bias_norm_backward_fake(
    grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, gelu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return empty_rows(x), weight.new_empty((3, *weight.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.gelu, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grads = _bias_norm_backward(grad, *ctx.saved_tensors, ctx.gelu, ctx.eps)
    return grad_x, *grads.unbind(), None, None, None


_bias_norm.register_autograd(_autograd, setup_context=_save)
