"""LayerNorm in plain PyTorch, alone and behind a residual sum.

    norm(x)[c] = (x[c] - mean) / sqrt(var + eps) · weight[c] + bias[c]

over the last dimension, in float32 (float64 for float64 x) whatever the dtypes in and out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quadmamba.kernels.fused.scaled_add.reference import scale_rows


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError unless x is floating (..., d) and weight and bias are (d)."""
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(
            f"layer_norm: expected floating x of shape (..., d), got {x.dtype} {tuple(x.shape)}"
        )
    for name, param in (("weight", weight), ("bias", bias)):
        if tuple(param.shape) != (x.shape[-1],) or param.device != x.device:
            raise ValueError(
                f"layer_norm: expected {name} of shape (d) = ({x.shape[-1]},) on {x.device}, "
                f"got {tuple(param.shape)} on {param.device}"
            )


def check_add(residual: Tensor, x: Tensor, scale: Tensor | None) -> None:
    """Raise ValueError unless residual, x are (b, ..., d) of one shape and scale is None or (b)."""
    if residual.shape != x.shape or x.dim() < 2:
        raise ValueError(
            f"add_layer_norm: expected residual and x of one shape (b, ..., d), "
            f"got {tuple(residual.shape)} and {tuple(x.shape)}"
        )
    if scale is not None and tuple(scale.shape) != (x.shape[0],):
        raise ValueError(
            f"add_layer_norm: expected scale of shape (b) = ({x.shape[0]},), "
            f"got {tuple(scale.shape)}"
        )


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm of x (..., d) over d; weight, bias: (d).

    The result has `out_dtype`, by default that of x. Raises ValueError for other shapes.
    """
    check_layer_norm(x, weight, bias)
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return out.to(out_dtype or x.dtype)


def add_layer_norm_ref(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, norm(total)) with total = residual + scale · x, in the dtype of residual.

    residual, x: (b, ..., d). scale: (b), one factor per sample, a constant. weight, bias: (d).
    The norm has `out_dtype`, by default x's. Raises ValueError for other shapes.
    """
    check_add(residual, x, scale)
    dtype = torch.promote_types(residual.dtype, torch.float32)
    branch = x.to(dtype) if scale is None else scale_rows(x.to(dtype), scale, dtype)
    total = (residual.to(dtype) + branch).to(residual.dtype)
    return total, layer_norm_ref(total, weight, bias, eps, out_dtype or x.dtype)


def layer_norm_grad_ref(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each float32 (float64 for float64 x)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    d = x.shape[-1]
    x, grad = x.to(dtype).reshape(-1, d), grad.to(dtype).reshape(-1, d)
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed, inner = centred * rstd, grad * weight.to(dtype)
    along = (inner * normed).mean(-1, keepdim=True)
    grad_x = (inner - inner.mean(-1, keepdim=True) - normed * along) * rstd
    return grad_x, (grad * normed).sum(0), grad.sum(0)
