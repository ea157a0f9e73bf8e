"""Convolution of stride 2, LayerNorm and GELU in plain PyTorch.

    gelu((y - mean) / sqrt(var + eps) · gain + shift),
    y[i, j, n] = bias[n] + sum over u, v in 0..2 and m of
                 weight[n, m, u, v] x[2 i + u - 1, 2 j + v - 1, m]

with zeros outside the image, mean and variance over n. x and weight are rounded to the dtype of the
result first; all else is float32 (float64 for a float64 result), rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quadmamba.kernels.fused.layer_norm.reference import layer_norm_grad_ref, layer_norm_ref


def check_patch_norm(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> None:
    """Raise ValueError unless x is floating (b, H, W, c_in), weight (c, c_in, 3, 3), the rest (c).

    b may be 0. The four parameters are of one dtype.
    """
    if x.dim() != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(
            "patch_norm: expected floating x of shape (b, H, W, c_in), images of a pixel or more, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    c = weight.shape[0] if weight.dim() else 0
    shapes = {"weight": (c, x.shape[3], 3, 3), "bias": (c,), "gain": (c,), "shift": (c,)}
    for (name, shape), param in zip(shapes.items(), (weight, bias, gain, shift)):
        if tuple(param.shape) != shape or not c or param.device != x.device:
            raise ValueError(
                f"patch_norm: expected weight (c, c_in, 3, 3) and bias, gain, shift (c) with "
                f"c_in = {x.shape[3]} on {x.device}, got {name} {tuple(param.shape)} on "
                f"{param.device}"
            )
        if param.dtype != weight.dtype:
            raise ValueError(
                "patch_norm: expected weight, bias, gain and shift of one dtype, got "
                f"{name} of {param.dtype} beside {weight.dtype}"
            )


def halved(side: int) -> int:
    """Side of the result for a side of the image: ceil(side / 2)."""
    return (side + 1) // 2


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution (b, h, w, c), and its rounded operands (b, c_in, H, W) and weight."""
    wide = torch.promote_types(dtype, torch.float32)
    grid = x.permute(0, 3, 1, 2).to(dtype).to(wide)  # (b, c_in, H, W)
    weight = weight.to(dtype).to(wide)
    with torch.autocast(x.device.type, enabled=False):
        out = F.conv2d(grid, weight, bias.to(wide), stride=2, padding=1)
    return out.permute(0, 2, 3, 1), grid, weight


def patch_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Images x (b, H, W, c_in) to (b, ceil(H / 2), ceil(W / 2), c).

    weight: (c, c_in, 3, 3). bias, gain, shift: (c). The result has `out_dtype`, by default that of
    x. Raises ValueError for other shapes.
    """
    check_patch_norm(x, weight, bias, gain, shift)
    dtype = out_dtype or x.dtype
    out = _convolve(x, weight, bias, dtype)[0]
    return F.gelu(layer_norm_ref(out, gain, shift, eps)).to(dtype)


def patch_norm_grad_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, bias, gain and shift, each float32 (float64 for float64 grad)."""
    out, grid, weight = _convolve(x, weight, bias, grad.dtype)
    before = layer_norm_ref(out, gain, shift, eps)
    grad = torch.ops.aten.gelu_backward(grad.to(before.dtype), before)
    grad_out, *grads = layer_norm_grad_ref(grad, out, gain, eps)
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_out.view(out.shape).permute(0, 3, 1, 2), grid, weight, None,
        [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False],
    )  # fmt: skip
    return grad_weight, grad_out.sum(0), *grads
