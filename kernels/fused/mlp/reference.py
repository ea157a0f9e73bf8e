"""The MLP in plain PyTorch: linear, exact GELU, linear."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def check_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> None:
    """Raise ValueError unless x is floating (..., c) and the layers, of one dtype, c -> m -> c2."""
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"mlp: expected floating x (..., c), got {x.dtype} {tuple(x.shape)}")
    if bias1.dim() != 1 or bias2.dim() != 1:
        got = f"{tuple(bias1.shape)} and {tuple(bias2.shape)}"
        raise ValueError(f"mlp: expected biases of shape (m) and (c2), got {got}")
    dtypes = {param.dtype for param in (weight1, bias1, weight2, bias2)}
    if len(dtypes) > 1:
        raise ValueError(f"mlp: expected parameters of one dtype, got {sorted(map(str, dtypes))}")
    hidden, out = len(bias1), len(bias2)
    shapes = {
        "weight1": (weight1, (hidden, x.shape[-1])),
        "bias1": (bias1, (hidden,)),
        "weight2": (weight2, (out, hidden)),
        "bias2": (bias2, (out,)),
    }
    for name, (param, shape) in shapes.items():
        if tuple(param.shape) != shape or param.device != x.device:
            raise ValueError(
                f"mlp: expected {name} of shape {shape} on {x.device}, "
                f"got {tuple(param.shape)} on {param.device}"
            )


def mlp_ref(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """weight2 gelu(weight1 x + bias1) + bias2, (..., c) to (..., c2), in the dtype of x.

    weight1: (m, c), bias1: (m), weight2: (c2, m), bias2: (c2). Raises ValueError for other shapes.
    """
    check_mlp(x, weight1, bias1, weight2, bias2)
    return mlp_values_ref(x, weight1, bias1, weight2, bias2)[0]


def mlp_values_ref(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    """The result of `mlp_ref` and the hidden values before the GELU."""
    hidden = F.linear(x, weight1.to(x.dtype), bias1.to(x.dtype))
    return F.linear(F.gelu(hidden), weight2.to(x.dtype), bias2.to(x.dtype)), hidden
