"""`patch_norm` as torch.library ops: Triton for CUDA tensors, the reference for CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.launch import check_half_or_single, compute_dtype, triton_kernels
from quadmamba.kernels.fused.patch_norm.reference import (
    check_patch_norm,
    halved,
    patch_norm_grad_ref,
    patch_norm_ref,
)

HALVES = (torch.float16, torch.bfloat16)  # dtypes of the products on CUDA
MAX_C_IN, MAX_C = 7, 256  # channels on CUDA: a patch of 64 numbers at most


def patch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float = 1e-5
) -> Tensor:
    """GELU of the LayerNorm of a 3x3 convolution of images, stride 2 and padding 1.

    x: (b, H, W, c_in). weight: (c, c_in, 3, 3). bias of the convolution, gain and shift of the
    norm: (c). Returns (b, ceil(H / 2), ceil(W / 2), c) in the compute dtype, that of autocast where
    it is on, else that of x. x and weight are rounded to it; sums, norm and GELU are float32.

    For the first layer of a model: there is no gradient for x. Those of the parameters are sums in
    float32, rounded to their dtype alone. Backward keeps the arguments and computes the rest anew.
    Runs are bit-equal. Raises ValueError for shapes or dtypes that do not fit, for x that requires
    a gradient, and on CUDA for a compute dtype other than float16 and bfloat16, more than 7
    channels in or more than 256 out; RuntimeError on CUDA without Triton.
    """
    check_patch_norm(x, weight, bias, gain, shift)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "patch_norm: expected images x that require no gradient, got x.requires_grad; "
            "use patch_norm_ref, or convolution, norm and GELU by themselves"
        )
    return _patch_norm(x, weight, bias, gain, shift, eps, compute_dtype(x))


def takes_patch_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `patch_norm` takes images x (b, H, W, c_in) on the GPU, with this weight."""
    read = (*HALVES, torch.float32)
    if not x.is_cuda or x.dtype not in read or weight.dtype not in read:
        return False
    if x.dim() != 4 or weight.shape[1:] != (x.shape[3], 3, 3) or 0 in x.shape[1:]:
        return False
    if x.shape[3] > MAX_C_IN or not 0 < weight.shape[0] <= MAX_C:
        return False
    return compute_dtype(x) in HALVES and not (x.requires_grad and torch.is_grad_enabled())


def _check_cuda(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for what the kernels have no way for."""
    check_half_or_single("patch_norm", x, weight)
    if dtype not in HALVES:
        raise ValueError(
            f"patch_norm: expected to compute in float16 or bfloat16 on CUDA, got {dtype}; use "
            "autocast, or convolution, norm and GELU by themselves"
        )
    if x.shape[3] > MAX_C_IN or weight.shape[0] > MAX_C:
        raise ValueError(
            f"patch_norm: expected at most {MAX_C_IN} channels in and {MAX_C} out on CUDA, got "
            f"{x.shape[3]} and {weight.shape[0]}"
        )


@triton_op("quadmamba::patch_norm")
def _patch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    _check_cuda(x, weight, dtype)
    tensors = [t.contiguous() for t in (x, weight, bias, gain, shift)]
    return triton_kernels(__package__).forward(*tensors, eps, dtype)


@_patch_norm.register_kernel("cpu")
def _patch_norm_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return patch_norm_ref(x, weight, bias, gain, shift, eps, dtype).contiguous()


@_patch_norm.register_fake
def _patch_norm_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    check_patch_norm(x, weight, bias, gain, shift)
    b, h, w, _ = x.shape
    return x.new_empty((b, halved(h), halved(w), weight.shape[0]), dtype=dtype)


@triton_op("quadmamba::patch_norm_backward")
def _patch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """The gradients of weight, bias, gain and shift in one row, in float32."""
    _check_cuda(x, weight, grad.dtype)
    tensors = [t.contiguous() for t in (grad, x, weight, bias, gain, shift)]
    return triton_kernels(__package__).backward(*tensors, eps)


@_patch_norm_backward.register_kernel("cpu")
def _patch_norm_backward_cpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    grads = patch_norm_grad_ref(grad, x, weight, bias, gain, shift, eps)
    return torch.cat([found.reshape(-1) for found in grads])


@_patch_norm_backward.register_fake
def _patch_norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    size = weight.numel() + 3 * weight.shape[0]
    return grad.new_empty(size, dtype=torch.promote_types(grad.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    weight, c = tensors[1], tensors[1].shape[0]
    found = _patch_norm_backward(grad, *tensors, ctx.eps).to(weight.dtype)
    grad_weight, *grads = found.split([weight.numel(), c, c, c])
    return None, grad_weight.view(weight.shape), *grads, None, None


_patch_norm.register_autograd(_autograd, setup_context=_save)


@register_flop_formula(torch.ops.quadmamba.patch_norm)
def _flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Two operations a multiply-add, torch's convention; those of the convolution alone."""
    b, h, w, _ = x_shape
    return 2 * b * halved(h) * halved(w) * math.prod(weight_shape)


@register_flop_formula(torch.ops.quadmamba.patch_norm_backward)
def _flops_backward(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """The gradient of weight; the convolution computed anew is not counted."""
    return _flops(x_shape, weight_shape)
