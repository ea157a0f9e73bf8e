"""`linear` as torch.library ops: cuBLAS for CUDA tensors, plain products on the CPU."""

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
from quadmamba.kernels.fused.launch import compute_dtype, empty_rows, weight_grad


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """weight x in autocast's dtype where it is on, (..., c) to (..., *n), weight (*n, c).

    Backward keeps x and the weight in that dtype; the weight's gradient is a sum in float32,
    rounded to the weight's dtype alone. Raises ValueError for shapes or dtypes that do not fit.
    """
    fits = x.dim() > 0 and weight.dim() > 1 and x.shape[-1] == weight.shape[-1]
    floating = x.is_floating_point() and weight.is_floating_point()
    if not fits or not floating or x.device != weight.device:
        raise ValueError(
            "linear: expected floating x (..., c) and weight (n, c) on one device, got "
            f"{x.dtype} {tuple(x.shape)} on {x.device} and {weight.dtype} {tuple(weight.shape)} "
            f"on {weight.device}"
        )
    x = x.to(compute_dtype(x))
    return _linear(x, weight, cast(weight, x.dtype))


@triton_op("quadmamba::linear")
def _linear(x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
    y = F.linear(x.reshape(-1, x.shape[-1]), copy.flatten(0, -2))
    return y.view(*x.shape[:-1], *copy.shape[:-1])


_linear.register_kernel("cpu")(_linear.kernels["cuda"])


@_linear.register_fake
def _linear_fake(x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], *weight.shape[:-1]))


@triton_op("quadmamba::linear_backward")
def _linear_backward(
    grad: Tensor, x: Tensor, copy: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    matrix = copy.flatten(0, -2)
    rows = grad.reshape(math.prod(x.shape[:-1]), matrix.shape[0])
    return (rows @ matrix).view(x.shape), weight_grad(rows, x, dtype).view(copy.shape)


_linear_backward.register_kernel("cpu")(_linear_backward.kernels["cuda"])


@_linear_backward.register_fake
def _linear_backward_fake(
    grad: Tensor, x: Tensor, copy: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return empty_rows(x), empty_rows(copy, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, copy = inputs
    ctx.dtype = weight.dtype
    ctx.save_for_backward(x, copy)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_linear_backward(grad, *ctx.saved_tensors, ctx.dtype), None


_linear.register_autograd(_autograd, setup_context=_save)


@register_flop_formula(torch.ops.quadmamba.linear)
def _flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Two operations a multiply-add, torch's convention."""
    return 2 * math.prod(x_shape) * math.prod(weight_shape[:-1])


@register_flop_formula(torch.ops.quadmamba.linear_backward)
def _flops_backward(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """The gradients of x and of the weight."""
    return 2 * _flops(x_shape, weight_shape)
