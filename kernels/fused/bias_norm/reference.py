"""Bias, LayerNorm and GELU in plain PyTorch.

    act((x + bias - mean) / sqrt(var + eps) · weight + shift)

over the last dimension, in float32 (float64 for float64 x) whatever the dtypes in and out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quadmamba.kernels.fused.layer_norm.reference import layer_norm_grad_ref, layer_norm_ref


def check_bias_norm(x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor) -> None:
    """Raise ValueError unless x is floating (..., d) and the others are (d) of one dtype."""
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(
            f"bias_norm: expected floating x of shape (..., d), got {x.dtype} {tuple(x.shape)}"
        )
    for name, param in (("bias", bias), ("weight", weight), ("shift", shift)):
        if tuple(param.shape) != (x.shape[-1],) or param.device != x.device:
            raise ValueError(
                f"bias_norm: expected {name} of shape (d) = ({x.shape[-1]},) on {x.device}, "
                f"got {tuple(param.shape)} on {param.device}"
            )
        if param.dtype != weight.dtype:
            raise ValueError(
                f"bias_norm: expected bias, weight and shift of one dtype, got {name} of "
                f"{param.dtype} beside {weight.dtype}"
            )


def bias_norm_ref(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool = False,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm of x + bias, (..., d) over d, and with `gelu` the GELU of it.

    bias, weight, shift: (d). The result has `out_dtype`, by default that of x. Raises ValueError
    for other shapes.
    """
    check_bias_norm(x, bias, weight, shift)
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = layer_norm_ref(x.to(dtype) + bias.to(dtype), weight, shift, eps)
    return (F.gelu(out) if gelu else out).to(out_dtype or x.dtype)


def bias_norm_grad_ref(
    grad: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, bias, weight and shift, each float32 (float64 for float64 x)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    total, grad = x.to(dtype) + bias.to(dtype), grad.to(dtype)
    if gelu:
        before = layer_norm_ref(total, weight, shift, eps)
        grad = torch.ops.aten.gelu_backward(grad, before)
    grad_x, *grads = layer_norm_grad_ref(grad, total, weight, eps)
    return grad_x.view(x.shape), grad_x.sum(0), *grads
