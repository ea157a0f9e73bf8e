"""Layers on token grids (b, h, w, c), channels last, and the weight-decay tags of parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadmamba.kernels.fused import (
    add_layer_norm,
    bias_norm,
    dwconv_silu,
    layer_norm,
    linear,
    mlp,
    patch_norm,
    scaled_add,
    takes_patch_norm,
)
from quadmamba.models.plain import plain_parts

NORM_EPS = 1e-5
# What is still to be added to the residual stream: values, and a factor (b) of each sample or None
Branch = tuple[Tensor, Tensor | None]


def tag(param: nn.Parameter, decay: str) -> nn.Parameter:
    """Mark `param` for the optimizer: "decay", "no_decay" or "ssm" (by TRAIN.DECAY_SSM)."""
    param.decay = decay
    return param


def tag_rest(model: nn.Module) -> None:
    """Tag what is not tagged yet: matrices and filters decay; biases and norms do not."""
    for param in model.parameters():
        if not hasattr(param, "decay"):
            tag(param, "decay" if param.dim() > 1 else "no_decay")


def is_fused(x: Tensor) -> bool:
    """Whether the fused kernels take `x`: they are for the GPU, and not for float64."""
    return x.is_cuda and x.dtype != torch.float64


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels; on a GPU fused, and then in autocast's dtype where it is on."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if is_fused(x):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class AddNorm(LayerNorm):
    """Residual sum and LayerNorm, on a GPU in one pass: (x + branch, norm of it)."""

    def forward(self, x: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        if branch is None:
            return x, super().forward(x)
        if is_fused(x):
            values, scale = branch
            return add_layer_norm(x, values, self.weight, self.bias, scale, self.eps)
        x = add(x, branch)
        return x, super().forward(x)


def add(x: Tensor, branch: Branch) -> Tensor:
    """The residual stream x (b, h, w, c) with a branch added to it."""
    values, scale = branch
    if scale is None:
        return x + values
    if is_fused(x):
        return scaled_add(x, values, scale)
    return torch.addcmul(x, values, scale.to(values.dtype).view(-1, 1, 1, 1))


class Linear(nn.Linear):
    """Linear layer without a bias. (..., dim) -> (..., out_dim)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) if is_fused(x) else super().forward(x)


class Mlp(nn.Module):
    """Linear, GELU, linear. (..., dim) -> the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if is_fused(x):
            return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.fc2(F.gelu(self.fc1(x)))


class GridConv2d(nn.Conv2d):
    """A convolution of a token grid: (b, h, w, c) -> (b, h', w', c'), with no copy on the way."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, 3, 1, 2))  # (b, c', h', w'), channels last in memory
        return y.permute(0, 2, 3, 1)


class DepthwiseSiLU(GridConv2d):
    """SiLU of a depthwise 3x3 convolution without bias. (b, h, w, dim) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if is_fused(x):
            return dwconv_silu(x, self.weight)
        return F.silu(super().forward(x))


class Stem(nn.Sequential):
    """Image to tokens at stride 4: two 3x3 convolutions of stride 2, each with a norm.

    (b, in_chans, H, W) -> (b, ceil(H / 4), ceil(W / 4), dim).
    """

    kinds = (GridConv2d, LayerNorm, nn.GELU, GridConv2d, LayerNorm)

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(
            GridConv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            LayerNorm(dim // 2),
            nn.GELU(),
            GridConv2d(dim // 2, dim, 3, stride=2, padding=1),
            LayerNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        if not _takes_conv_norm(self, x):
            return super().forward(x)
        conv, norm, _, conv2, norm2 = self
        usual = conv.stride, conv.padding, conv.dilation, conv.padding_mode
        if usual == ((2, 2), (1, 1), (1, 1), "zeros") and takes_patch_norm(x, conv.weight):
            x = patch_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)
        else:
            x = conv_norm(x, conv, norm, gelu=True)
        return conv_norm(x, conv2, norm2)


class Downsample(nn.Sequential):
    """Between stages: (b, h, w, dim) -> (b, ceil(h / 2), ceil(w / 2), out_dim)."""

    kinds = (GridConv2d, LayerNorm)

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(
            GridConv2d(dim, out_dim, 3, stride=2, padding=1),
            LayerNorm(out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, *self) if _takes_conv_norm(self, x) else super().forward(x)


def conv_norm(x: Tensor, conv: GridConv2d, norm: LayerNorm, *, gelu: bool = False) -> Tensor:
    """norm(conv(x)), or the GELU of it, where the pass of the norm adds the convolution's bias."""
    grid = conv._conv_forward(x.permute(0, 3, 1, 2), conv.weight, None)
    grid = grid.permute(0, 2, 3, 1)  # (b, h', w', c')
    return bias_norm(grid, conv.bias, norm.weight, norm.bias, gelu, norm.eps)


def _takes_conv_norm(module: Stem | Downsample, x: Tensor) -> bool:
    """Whether `conv_norm` may run in the place of the parts; see `plain_parts`."""
    if torch.compiler.is_compiling() or not is_fused(x) or plain_parts(module) != module.kinds:
        return False
    if any(isinstance(part, nn.GELU) and part.approximate != "none" for part in module):
        return False
    parts = [part for part in module if not isinstance(part, nn.GELU)]
    params = [param for part in parts for param in (part.weight, part.bias)]
    return all(p is not None and p.dtype == params[0].dtype for p in params)


class Head(nn.Module):
    """Classifier: norm, mean over the grid, linear. (b, h, w, c) -> (b, classes)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).mean((1, 2)))
