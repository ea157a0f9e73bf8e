"""Triton kernel of `scaled_add`: a program has a part of one sample, whose factor is a scalar."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from quadmamba.kernels.fused.jit import jit
from quadmamba.kernels.fused.launch import SIZES, ceil_div, device_of

BLOCK, WARPS = 4096, 4  # elements of a program


@jit(do_not_specialize=["blocks"])
def _scaled_kernel(
    x: tl.tensor, scale: tl.tensor, residual: tl.tensor, out: tl.tensor, size: tl.tensor,
    blocks: tl.tensor, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale · x of (b, size), with ADD plus residual."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, first = at < size, sample * size
    value = tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale + sample).to(tl.float32)
    if ADD:
        value += tl.load(residual + first + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + at, value.to(out.dtype.element_ty), mask=inside)


@lru_cache(SIZES)
def _launch(b: int, size: int, add: bool) -> tuple[Callable[..., None], tuple[int]]:
    """The kernel for (b, size) as a function of its tensors, and its grid."""
    blocks = ceil_div(size, BLOCK)
    kernel = _scaled_kernel.fixed(size=size, blocks=blocks, ADD=add, BLOCK=BLOCK, num_warps=WARPS)
    return kernel, (b * blocks,)


def scaled(x: Tensor, scale: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale · x, (b, ...), in `dtype`, plus `residual` where there is one; all contiguous."""
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        kernel, grid = _launch(x.shape[0], x.numel() // x.shape[0], residual is not None)
        with device_of(x):
            kernel(grid, x, scale, residual, out)
    return out
