"""residual + scale · x in plain PyTorch, where scale is one constant factor per sample."""

from __future__ import annotations

import torch
from torch import Tensor


def check_scaled_add(residual: Tensor, x: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless residual, x are floating (b, ...) of one shape and scale is (b)."""
    floating = residual.is_floating_point() and x.is_floating_point()
    if residual.shape != x.shape or x.dim() < 1 or not floating:
        raise ValueError(
            "scaled_add: expected floating residual and x of one shape (b, ...), "
            f"got {residual.dtype} {tuple(residual.shape)} and {x.dtype} {tuple(x.shape)}"
        )
    if tuple(scale.shape) != (x.shape[0],) or not residual.device == x.device == scale.device:
        raise ValueError(
            f"scaled_add: expected scale of shape (b) = ({x.shape[0]},) and all on one device, "
            f"got {tuple(scale.shape)} on {scale.device}, residual on {residual.device}, "
            f"x on {x.device}"
        )


def scale_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale · x, (b, ...), in `dtype`; computed in float32 (float64 for float64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * scale.detach().to(wide).view(-1, *[1] * (x.dim() - 1))).to(dtype)


def scaled_add_ref(residual: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """residual + scale · x, (b, ...), in the dtype of residual.

    scale: (b), one factor per sample, a constant. Raises ValueError for other shapes.
    """
    check_scaled_add(residual, x, scale)
    wide = torch.promote_types(torch.promote_types(residual.dtype, x.dtype), torch.float32)
    return (residual.to(wide) + scale_rows(x, scale, wide)).to(residual.dtype)
