"""Triton kernels of the MLP: GELU, its gradient, and sums over rows.

The normal distribution's tail is t P(t) exp(-x^2 / 2) with t = 1 / (1 + p |x|) (Abramowitz and
Stegun, 7.1.26; error of erf below 1.5e-7): one exponential serves the value and the derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadmamba.kernels.fused.jit import jit
from quadmamba.kernels.fused.launch import SIZES, ceil_div, device_of, power_of_2

BLOCK, WARPS = 2048, 4  # elements of a program of the forward pass
BLOCK_R, BLOCK_N, GRAD_WARPS = 16, 128, 4  # tile of the passes that sum over rows
PROGRAMS = 132 * 16  # of these passes: fill the largest GPUs, leave few partial sums


@triton.jit
def _normal(x: tl.tensor):
    """The normal distribution function of x, and exp(-x^2 / 2)."""
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    poly = 0.53070271 * t - 0.72657601
    poly = poly * t + 0.71070687
    poly = poly * t - 0.142248368
    poly = (poly * t + 0.127414796) * t
    bell = tl.exp2(x * x * -0.72134752)
    tail = poly * bell
    return tl.where(x < 0, tail, 1.0 - tail), bell


@jit()
def _gelu_kernel(x: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    value = value * _normal(value)[0]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)


@jit(do_not_specialize=["rows"])
def _rows_kernel(
    grad: tl.tensor, hidden: tl.tensor, out: tl.tensor, partial: tl.tensor,
    rows: tl.tensor, n: tl.tensor,
    GELU: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's share of the sum of grad over rows; with GELU of the gradient before it.

    With GELU grad is replaced by that gradient, and out becomes the GELU of hidden.
    """
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    first = tl.program_id(0).to(tl.int64) * TILES * BLOCK_R
    for tile in tl.range(TILES, num_stages=3):
        row = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (cols < n)[None, :]
        at = row[:, None] * n + cols[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
            normal, bell = _normal(x)
            g *= normal + x * bell * 0.39894228  # 1 / sqrt(2 pi)
            tl.store(out + at, (x * normal).to(out.dtype.element_ty), mask=inside)
            tl.store(grad + at, g.to(grad.dtype.element_ty), mask=inside)
        total += g
    part = partial + tl.program_id(0).to(tl.int64) * n + cols
    tl.store(part, tl.sum(total, 0), mask=cols < n)


@lru_cache(SIZES)
def _launch(size: int) -> tuple[Callable[..., None], tuple[int]]:
    """The GELU of so many elements, as a function of its tensors, and its grid."""
    return _gelu_kernel.fixed(size=size, BLOCK=BLOCK, num_warps=WARPS), (ceil_div(size, BLOCK),)


@lru_cache(SIZES)
def _launch_rows(rows: int, n: int, gelu: bool) -> tuple[Callable[..., None], tuple[int, int]]:
    """The walk over (rows, n), and its grid, of which the first side is that of partial sums."""
    blocks = ceil_div(n, BLOCK_N)
    tiles = power_of_2(ceil_div(rows * blocks, BLOCK_R * PROGRAMS))
    sides = {"TILES": tiles, "BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N, "num_warps": GRAD_WARPS}
    kernel = _rows_kernel.fixed(rows=rows, n=n, GELU=gelu, **sides)
    return kernel, (ceil_div(rows, BLOCK_R * tiles), blocks)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU of contiguous x."""
    out, size = torch.empty_like(x), x.numel()
    if size:
        kernel, grid = _launch(size)
        with device_of(x):
            kernel(grid, x, out)
    return out


def _walk_rows(grad: Tensor, hidden: Tensor | None, out: Tensor | None) -> Tensor:
    """Launch the kernel over (rows, n); the sums over rows (n), in float32 and a fixed order."""
    rows, n = grad.shape
    kernel, grid = _launch_rows(rows, n, hidden is not None)
    partial = grad.new_empty((grid[0], n), dtype=torch.float32)
    if rows and n:
        with device_of(grad):
            kernel(grid, grad, hidden, out, partial)
    return partial.sum(0)


def gelu_backward_(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the gradient of gelu(hidden) into that of hidden, in place; both (rows, n), contiguous.

    Returns gelu(hidden), and the sums of the new gradient over the rows (n) in float32.
    """
    out = torch.empty_like(hidden)
    return out, _walk_rows(grad, hidden, out)


def sum_rows(x: Tensor) -> Tensor:
    """Sums over the rows of contiguous x (rows, n): (n) in float32."""
    return _walk_rows(x, None, None)
