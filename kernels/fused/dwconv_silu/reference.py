"""Depthwise 3x3 convolution and SiLU in plain PyTorch.

out[y, x, c] = silu(sum over i, j in 0..2 of weight[c, 0, i, j] in[y + i - 1, x + j - 1, c])

with zeros outside the grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_dwconv(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless x is floating (b, h, w, d) and weight (d, 1, 3, 3)."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            "dwconv_silu: expected floating x of shape (b, h, w, d), "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    shape = (x.shape[3], 1, 3, 3)
    if tuple(weight.shape) != shape or weight.device != x.device:
        raise ValueError(
            f"dwconv_silu: expected weight of shape (d, 1, 3, 3) = {shape} on {x.device}, "
            f"got {tuple(weight.shape)} on {weight.device}"
        )


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution alone, (b, h, w, d) to (b, h, w, d), in the dtype of x."""
    grid = x.permute(0, 3, 1, 2)  # (b, d, h, w)
    with torch.autocast(x.device.type, enabled=False):
        out = F.conv2d(grid, weight.to(x.dtype), padding=1, groups=x.shape[3])
    return out.permute(0, 2, 3, 1)


def dwconv_silu_ref(x: Tensor, weight: Tensor) -> Tensor:
    """silu(convolution of x), (b, h, w, d) to (b, h, w, d).

    weight: (d, 1, 3, 3), cast to the dtype of x. Raises ValueError for other shapes.
    """
    check_dwconv(x, weight)
    return F.silu(convolve(x, weight))


def dwconv_silu_grad_ref(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, the pre-activation computed anew."""
    grad = torch.ops.aten.silu_backward(grad, convolve(x, weight))
    cast, d = weight.to(x.dtype), x.shape[3]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), cast, None,
        [1, 1], [1, 1], [1, 1], False, [0, 0], d, [True, True, False],
    )  # fmt: skip
    return grad_x.permute(0, 2, 3, 1), grad_weight.to(weight.dtype)
