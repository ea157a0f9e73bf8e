"""The QuadMamba backbone and classifier (paper section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quadmamba.kernels import nodes
from quadmamba.kernels.fused import cast_together
from quadmamba.kernels.fused.launch import compute_dtype
from quadmamba.models.layers import (
    AddNorm,
    Branch,
    Downsample,
    Head,
    Mlp,
    Stem,
    add,
    is_fused,
    tag_rest,
)
from quadmamba.models.orders import SHIFT_SIGNS, QuadtreeOrder, ScanOrder, build_order
from quadmamba.models.plain import fits, own, plain_parts, takes_node
from quadmamba.models.ss2d import PARTS, SS2D, QuadSS2D


class Block(nn.Module):
    """Mixer and MLP, each behind a norm and beside the residual stream x (b, h, w, dim).

    A branch is added to the stream at the norm that follows, in one pass with it, so a block begins
    with the branch that the block before it left and leaves that of its MLP.
    """

    def __init__(self, dim: int, *, op: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = AddNorm(dim)
        self.op = op
        self.norm2 = AddNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, branch: Branch | None, scales: Sequence[Tensor | None]
    ) -> tuple[Tensor, Branch]:
        """The stream and the branch to be added to it; scales: drop path of mixer and MLP."""
        if takes_node(x) and plain_parts(self) in BLOCK_PARTS:
            whole = self._as_node(x, branch, scales)
            if whole is not None:
                return whole
        x, normed = self.norm(x, branch)
        x, normed = self.norm2(x, (self.op(normed), scales[0]))
        return x, (self.mlp(normed), scales[1])

    def _as_node(
        self, x: Tensor, branch: Branch | None, scales: Sequence[Tensor | None]
    ) -> tuple[Tensor, Branch] | None:
        """`forward` as one node, or None where it can be none."""
        values, scale = branch if branch is not None else (None, None)
        dtype, plan, weights = compute_dtype(x), self.op.plan(x), self.weights()
        given = [values, scale, scales[0]]
        if plan is None or not fits(x, given, weights) or not nodes.Block.takes(x.shape, weights):
            return None
        if values is not None and (values.dtype != dtype or values.shape != x.shape):
            return None
        if any(factor is not None and factor.shape != x.shape[:1] for factor in given[1:]):
            return None
        block = nodes.Block(plan, dtype, self.norm.eps, self.norm2.eps)
        inputs = [x, *given, *weights[:8], self.op.chosen(x), *weights[8:]]
        x, values = nodes.run(block, inputs)
        return x, (values, scales[1])

    def weights(self) -> list[Tensor | None]:
        """All parameters, as a node takes them; see `nodes.Block`."""
        norm, op, norm2, mlp = self._modules.values()
        layers = norm, norm2, *mlp._modules.values()
        return [*(param for part in layers for param in own(part, "weight", "bias")), *op.weights()]

    def matrices(self) -> list[Tensor]:
        """The parameters that a step in half precision wants in half precision."""
        op, mlp = self.op._modules, self.mlp._modules
        scan = own(op["ssm"], "x_proj_weight")
        ends = *own(op["in_proj"], "weight"), *own(op["out_proj"], "weight")
        layers = (own(layer, "weight", "bias") for layer in (mlp["fc1"], mlp["fc2"]))
        found = *scan, *ends, *(param for layer in layers for param in layer)
        return [param for param in found if param is not None]


class QuadMamba(nn.Module):
    """Four-stage backbone with a classifier; stage i works on a grid of stride 2^(i+2).

    dims, depths, orders: channels, blocks and scan order (a key of `ORDERS`) of each stage.
    window: side of the windows of "window". ssm_ratio: inner over outer channels of the mixer.
    shift: roll the grid in every second block of a quadtree stage, in turn in the first
    `shift_directions` (1 to 4) of `SHIFT_SIGNS`. partition: see `QuadtreeOrder`. selection, tau,
    gumbel: see `QuadSS2D`. drop_path: stochastic depth of the last block; it grows linearly from 0.
    use_checkpoint: recompute blocks in the backward.

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
        self.drop_path = drop_path
        keep = 1 - torch.linspace(0, drop_path, sum(depths)).view(-1, 1, 1)
        self.register_buffer("keep", keep, persistent=False)  # of each block
        choice = {"selection": selection, "tau": tau, "gumbel": gumbel}
        signs = SHIFT_SIGNS[:shift_directions] if shift else [None]
        self.stem = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, order in enumerate(build_order(name, window, partition) for name in orders):
            blocks = nn.ModuleList()
            for j in range(depths[i]):
                index = sum(depths[:i]) + j
                sign = signs[index // 2 % len(signs)] if j % 2 else None
                quad = {**choice, "sign": sign, "seed": index}
                op = _build_mixer(dims[i], order, mixer, quad)
                blocks.append(Block(dims[i], op=op, mlp_ratio=mlp_ratio))
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
        return [rearrange(grid, "b h w c -> b c h w").contiguous() for grid in self._stages(x)]

    def _stages(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(
                f"QuadMamba: expected images (b, {self.in_chans}, H, W), got {tuple(x.shape)}"
            )
        scales = iter(self._drop_path_scales(len(x)))
        x = self.stem(x)  # (b, h, w, c)
        grids = []
        with self._casting(x):
            for i, blocks in enumerate(self.stages):
                x = self.downsamples[i - 1](x) if i else x
                branch: Branch | None = None
                for block in blocks:
                    if self.use_checkpoint and self.training:
                        x, branch = checkpoint(block, x, branch, next(scales), use_reentrant=False)
                    else:
                        x, branch = block(x, branch, next(scales))
                x = x if branch is None else add(x, branch)
                grids.append(x)
        return grids

    def _casting(self, x: Tensor) -> AbstractContextManager[None]:
        """Casts the matrices of all blocks at once, where the fused ops want them in half."""
        if not is_fused(x) or torch.compiler.is_compiling():
            return nullcontext()
        blocks = (block for stage in self.stages for block in stage)
        return cast_together([p for block in blocks for p in block.matrices()], x)

    def _drop_path_scales(self, batch: int) -> Sequence[Sequence[Tensor | None]]:
        """For mixer and MLP of each block, factors (b): 0 for a dropped sample, else 1 / keep."""
        if not (self.training and self.drop_path):
            return [(None, None)] * len(self.keep)
        kept = torch.rand(len(self.keep), 2, batch, device=self.keep.device) < self.keep
        scales = (kept / self.keep.clamp(min=1e-6)).flatten(0, 1).unbind()  # each (b)
        return list(zip(scales[::2], scales[1::2]))

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module."""
        shown = ("num_classes", "drop_path", "use_checkpoint")
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)


# Types of the parts of a block that can be one node, at all depths, in order
BLOCK_PARTS = {
    (AddNorm, op, *parts, AddNorm, Mlp, nn.Linear, nn.Linear)
    for op, kinds in PARTS.items()
    for parts in kinds
}


def _build_mixer(dim: int, order: ScanOrder, mixer: dict[str, Any], quad: dict[str, Any]) -> SS2D:
    if isinstance(order, QuadtreeOrder):
        return QuadSS2D(dim, order=order, **mixer, **quad)
    return SS2D(dim, order=order, **mixer)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
