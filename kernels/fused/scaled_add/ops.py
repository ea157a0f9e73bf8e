"""`scaled_add` as torch.library ops: Triton for CUDA tensors, the reference for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.launch import check_half_or_single, empty_rows, triton_kernels
from quadmamba.kernels.fused.scaled_add.reference import (
    check_scaled_add,
    scale_rows,
    scaled_add_ref,
)


def scaled_add(residual: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """residual + scale · x, (b, ...), in one pass and in the dtype of residual.

    scale: (b), a constant factor per sample (drop path). Backward keeps scale alone. Raises
    ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_scaled_add(residual, x, scale)
    return _scaled_add(residual, x, scale)


@triton_op("quadmamba::scaled_add")
def _scaled_add(residual: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    check_half_or_single("scaled_add", residual, x)
    tensors = x.contiguous(), scale.contiguous(), residual.contiguous()
    return triton_kernels(__package__).scaled(*tensors, residual.dtype)


@_scaled_add.register_kernel("cpu")
def _scaled_add_cpu(residual: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return scaled_add_ref(residual, x, scale).contiguous()


@_scaled_add.register_fake
def _scaled_add_fake(residual: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    check_scaled_add(residual, x, scale)
    return empty_rows(residual)


@triton_op("quadmamba::scaled_add_backward")
def _scaled_add_backward(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_half_or_single("scaled_add", grad)
    kernels = triton_kernels(__package__)
    return kernels.scaled(grad.contiguous(), scale.contiguous(), None, dtype)


@_scaled_add_backward.register_kernel("cpu")
def _scaled_add_backward_cpu(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scale_rows(grad, scale, dtype).contiguous()


@_scaled_add_backward.register_fake
def _scaled_add_backward_fake(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return empty_rows(grad, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, scale = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(scale)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return grad, _scaled_add_backward(grad, *ctx.saved_tensors, ctx.dtype), None


_scaled_add.register_autograd(_autograd, setup_context=_save)
