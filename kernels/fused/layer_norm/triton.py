"""Triton kernels of the LayerNorm: a program holds whole rows, so each tensor is read once.

Mean and deviation are computed anew in backward from the row that is read there anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadmamba.kernels.fused.jit import jit
from quadmamba.kernels.fused.launch import (
    MAX_PARTIALS,
    SIZES,
    ceil_div,
    device_of,
    power_of_2,
    row_block,
    row_warps,
)

TILE, WARPS = 2048, 4  # elements of a program's tile
GRAD_TILE, GRAD_WARPS, ADD_GRAD_WARPS = 512, 2, 1
MAX_D = 16384


@triton.jit
def _centre(x: tl.tensor, inside: tl.tensor, d: tl.tensor, eps: tl.tensor):
    """x less its mean over a row, and 1 / deviation; x is zero outside the row."""
    mean = tl.sum(x, 1) / d
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 1) / d + eps)


@jit(do_not_specialize=["rows", "per_sample"])
def _norm_kernel(
    x: tl.tensor, residual: tl.tensor, scale: tl.tensor, weight: tl.tensor, bias: tl.tensor,
    total: tl.tensor, out: tl.tensor, rows: tl.tensor, per_sample: tl.tensor, d: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr, SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (cols < d)[None, :]
    at = row[:, None] * d + cols[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        if SCALE:
            factor = tl.load(scale + row // per_sample, mask=row < rows, other=0.0)
            value = value * factor.to(tl.float32)[:, None]
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
        value = value.to(tl.float32)
    centred, rstd = _centre(value, inside, d, eps)
    gain = tl.load(weight + cols, mask=cols < d, other=0.0).to(tl.float32)
    shift = tl.load(bias + cols, mask=cols < d, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * gain[None, :] + shift[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "per_sample"])
def _norm_grad_kernel(
    grad: tl.tensor, grad_total: tl.tensor, x: tl.tensor, scale: tl.tensor, weight: tl.tensor,
    grad_residual: tl.tensor, grad_x: tl.tensor, partial: tl.tensor,
    rows: tl.tensor, per_sample: tl.tensor, d: tl.tensor, eps: tl.tensor,
    ADD: tl.constexpr, SCALE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    gain = tl.load(weight + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    grad_gain = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    grad_shift = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in tl.range(TILES, num_stages=3):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (cols < d)[None, :]
        at = row[:, None] * d + cols[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        centred, rstd = _centre(value, inside, d, eps)
        normed = centred * rstd[:, None]
        inner = g * gain
        along = tl.sum(inner * normed, 1) / d
        result = (inner - (tl.sum(inner, 1) / d)[:, None] - normed * along[:, None]) * rstd[:, None]
        if ADD:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_residual + at, result.to(grad_residual.dtype.element_ty), mask=inside)
            if SCALE:
                factor = tl.load(scale + row // per_sample, mask=row < rows, other=0.0)
                result = result * factor.to(tl.float32)[:, None]
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)
        grad_gain += g * normed
        grad_shift += g
    part = partial + tl.program_id(0).to(tl.int64) * 2 * d + cols
    tl.store(part, tl.sum(grad_gain, 0), mask=cols < d)
    tl.store(part + d, tl.sum(grad_shift, 0), mask=cols < d)


class _Launch(NamedTuple):
    """A kernel for one size, as a function of its tensors. grid: how many programs."""

    kernel: Callable[..., None]
    grid: tuple[int]


@lru_cache(SIZES)
def _launch(
    rows: int, b: int, d: int, eps: float, add: bool, scale: bool, backward: bool
) -> _Launch:
    """For (rows, d), of b samples."""
    if d > MAX_D:
        raise ValueError(f"layer_norm: expected at most {MAX_D} channels on CUDA, got {d}")
    tile, warps = (GRAD_TILE, ADD_GRAD_WARPS if add else GRAD_WARPS) if backward else (TILE, WARPS)
    block_r, block_d = row_block(d, tile)
    if block_r == 1:  # a warp takes a row of 512 by itself, as sums then stay within it
        warps = row_warps(block_d, 1 if backward else warps)
    sizes = {"rows": rows, "per_sample": rows // max(b, 1), "d": d, "eps": eps}
    sides = {"ADD": add, "SCALE": scale, "BLOCK_R": block_r, "BLOCK_D": block_d}
    if not backward:
        kernel = _norm_kernel.fixed(**sizes, **sides, num_warps=warps)
        return _Launch(kernel, (ceil_div(rows, block_r),))
    tiles = power_of_2(ceil_div(rows, block_r * MAX_PARTIALS))
    kernel = _norm_grad_kernel.fixed(**sizes, **sides, TILES=tiles, num_warps=warps)
    return _Launch(kernel, (ceil_div(rows, block_r * tiles),))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, norm of total), total = residual + scale · x; without residual (x, norm of x).

    x, residual: (b, ..., d). scale: (b). weight, bias: (d). All contiguous.
    """
    d, size, scaled = x.shape[-1], x.numel(), scale is not None
    rows = size // max(d, 1)
    kernel, grid = _launch(rows, x.shape[0], d, eps, residual is not None, scaled, False)
    out = torch.empty_like(x, dtype=out_dtype)
    total = x if residual is None else torch.empty_like(residual)
    if size:
        with device_of(x):
            kernel(grid, x, residual, scale, weight, bias, total, out)
    return total, out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    grad_total: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual, x (of `x_dtype`), and [weight, bias] (2, d); x is the total, if any.

    grad, grad_total: gradients of the norm and of the total. Without `grad_total` there is no
    residual and its gradient is empty. All contiguous. Partial sums add up in a fixed order.
    """
    d, add, size = x.shape[-1], grad_total is not None, x.numel()
    rows = size // max(d, 1)
    kernel, grid = _launch(rows, x.shape[0], d, eps, add, scale is not None, True)
    grad_residual = torch.empty_like(x) if add else x.new_empty(0)
    grad_x = torch.empty_like(x, dtype=x_dtype)
    partial = x.new_empty((*grid, 2, d), dtype=torch.float32)
    if size:
        with device_of(x):
            kernel(grid, grad, grad_total, x, scale, weight, grad_residual, grad_x, partial)
    return grad_residual, grad_x, partial.sum(0).to(weight.dtype)
