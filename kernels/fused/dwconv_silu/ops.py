"""`dwconv_silu` as torch.library ops: Triton for CUDA tensors, the reference for CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.dwconv_silu.reference import (
    check_dwconv,
    dwconv_silu_grad_ref,
    dwconv_silu_ref,
)
from quadmamba.kernels.fused.launch import check_half_or_single, empty_rows, triton_kernels


def dwconv_silu(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a depthwise 3x3 convolution (padding 1, no bias), (b, h, w, d) to (b, h, w, d).

    weight: (d, 1, 3, 3), any floating dtype; sums are float32, the output has the dtype of x.
    Backward computes the pre-activation anew: only x is kept. Runs are bit-equal.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_dwconv(x, weight)
    return _dwconv_silu(x, weight)


@triton_op("quadmamba::dwconv_silu")
def _dwconv_silu(x: Tensor, weight: Tensor) -> Tensor:
    check_half_or_single("dwconv_silu", x)
    return triton_kernels(__package__).forward(x.contiguous(), weight.contiguous())


@_dwconv_silu.register_kernel("cpu")
def _dwconv_silu_cpu(x: Tensor, weight: Tensor) -> Tensor:
    return dwconv_silu_ref(x, weight).contiguous()


@_dwconv_silu.register_fake
def _dwconv_silu_fake(x: Tensor, weight: Tensor) -> Tensor:
    check_dwconv(x, weight)
    return empty_rows(x)


@triton_op("quadmamba::dwconv_silu_backward")
def _dwconv_silu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    check_half_or_single("dwconv_silu", x)
    kernels = triton_kernels(__package__)
    return kernels.backward(grad.contiguous(), x.contiguous(), weight.contiguous())


@_dwconv_silu_backward.register_kernel("cpu")
def _dwconv_silu_backward_cpu(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = dwconv_silu_grad_ref(grad, x, weight)
    return grad_x.contiguous(), grad_weight.contiguous()


@_dwconv_silu_backward.register_fake
def _dwconv_silu_backward_fake(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x), empty_rows(weight)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _dwconv_silu_backward(grad, *ctx.saved_tensors)


_dwconv_silu.register_autograd(_autograd, setup_context=_save_inputs)


@register_flop_formula(torch.ops.quadmamba.dwconv_silu)
def _flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Two operations a multiply-add, torch's convention."""
    return 18 * math.prod(x_shape)


@register_flop_formula(torch.ops.quadmamba.dwconv_silu_backward)
def _flops_backward(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """The gradients of x and of weight; the pre-activation computed anew is not counted."""
    return 36 * math.prod(x_shape)
