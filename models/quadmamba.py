"""The QuadMamba backbone and classifier (paper section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quadmamba.models.layers import Downsample, Head, LayerNorm, Stem, tag_rest
from quadmamba.models.orders import SHIFT_SIGNS, QuadtreeOrder, ScanOrder, build_order
from quadmamba.models.ss2d import SS2D, QuadSS2D


class Block(nn.Module):
    """x + drop_path(op(norm(x))), then x + drop_path(mlp(norm2(x))). (b, h, w, dim) -> the same."""

    def __init__(self, dim: int, *, op: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.op = op
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class QuadMamba(nn.Module):
    """Four-stage backbone with a classifier; stage i works on a grid of stride 2^(i+2).

    dims, depths, orders: channels, blocks and scan order (a key of `ORDERS`) of each stage.
    window: side of the windows of "window". ssm_ratio: inner over outer channels of the mixer.
    shift: roll the grid in every second block of a quadtree stage, in turn in the first
    `shift_directions` (1 to 4) of `SHIFT_SIGNS`. partition: see `QuadtreeOrder`. selection, tau,
    gumbel: see `QuadSS2D`. use_checkpoint: recompute blocks in the backward.

    Any H, W >= 1. In eval mode the output is a function of the input alone; in training mode
    torch's global generators drive the Gumbel noise and the stochastic depth.

    | initialisation | value |
    |---|---|
    | Linear | weight trunc-normal(std 0.02), bias 0 |
    | Conv2d | PyTorch's default (Kaiming uniform), as in VMamba |
    | LayerNorm | weight 1, bias 0 |
    | scan | see `ScanParameters` |
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        dims: Sequence[int],
        *,
        depths: Sequence[int],
        orders: Sequence[str] = ("quadtree", "quadtree", "raster", "raster"),
        num_classes: int = 1000,
        in_chans: int = 3,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        window: int = 7,
        partition: Sequence[int] = (2, 4),
        selection: str = "predictor",
        shift: bool = True,
        shift_directions: int = 4,
        tau: float = 1.0,
        gumbel: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(orders) == 4:
            got = f"{len(dims)}, {len(depths)} and {len(orders)}"
            raise ValueError(f"QuadMamba: expected 4 dims, depths and orders, got {got}")
        if not 1 <= shift_directions <= len(SHIFT_SIGNS):
            raise ValueError(f"shift_directions: expected 1 to 4, got {shift_directions}")
        self.out_channels, self.in_chans = tuple(dims), in_chans
        self.num_classes, self.use_checkpoint = num_classes, use_checkpoint
        mixer = {"ssm_ratio": ssm_ratio, "d_state": d_state}
        choice = {"selection": selection, "tau": tau, "gumbel": gumbel}
        signs = SHIFT_SIGNS[:shift_directions] if shift else [None]
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()
        self.stem = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, order in enumerate(build_order(name, window, partition) for name in orders):
            blocks = nn.ModuleList()
            for j in range(depths[i]):
                index = sum(depths[:i]) + j
                sign = signs[index // 2 % len(signs)] if j % 2 else None
                quad = {**choice, "sign": sign, "seed": index}
                op = _build_mixer(dims[i], order, mixer, quad)
                blocks.append(Block(dims[i], op=op, mlp_ratio=mlp_ratio, drop_path=rates[index]))
            self.stages.append(blocks)
        self.downsamples = nn.ModuleList(Downsample(a, b) for a, b in zip(dims, dims[1:]))
        self.head = Head(dims[-1], num_classes)
        self.apply(_init_weights)
        tag_rest(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (b, in_chans, H, W)."""
        return self.head(self._stages(x)[-1])

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Four contiguous maps (b, out_channels[i], ceil(H / strides[i]), ceil(W / strides[i]))."""
        return [grid.permute(0, 3, 1, 2).contiguous() for grid in self._stages(x)]

    def _stages(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(
                f"QuadMamba: expected images (b, {self.in_chans}, H, W), got {tuple(x.shape)}"
            )
        x = self.stem(x)  # (b, h, w, c)
        grids = []
        for i, blocks in enumerate(self.stages):
            x = self.downsamples[i - 1](x) if i else x
            for block in blocks:
                if self.use_checkpoint and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            grids.append(x)
        return grids

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module."""
        return f"num_classes={self.num_classes}, use_checkpoint={self.use_checkpoint}"


def _build_mixer(dim: int, order: ScanOrder, mixer: dict[str, Any], quad: dict[str, Any]) -> SS2D:
    if isinstance(order, QuadtreeOrder):
        return QuadSS2D(dim, order=order, **mixer, **quad)
    return SS2D(dim, order=order, **mixer)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
