"""Triton kernels of `bias_norm`: a program holds whole rows, so each tensor is read once.

Backward computes everything anew from the row that is read there anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
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
from quadmamba.kernels.fused.layer_norm.triton import MAX_D, _centre
from quadmamba.kernels.fused.mlp.triton import _normal

TILE, WARPS = 2048, 4  # elements of a program's tile
GRAD_TILE, GRAD_WARPS = 512, 1


@jit(do_not_specialize=["rows"])
def _bias_norm_kernel(
    x: tl.tensor, bias: tl.tensor, weight: tl.tensor, shift: tl.tensor, out: tl.tensor,
    rows: tl.tensor, d: tl.tensor, eps: tl.tensor,
    GELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (cols < d)[None, :]
    at = row[:, None] * d + cols[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    centred, rstd = _centre(value, inside, d, eps)
    gain = tl.load(weight + cols, mask=cols < d, other=0.0).to(tl.float32)
    start = tl.load(shift + cols, mask=cols < d, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * gain[None, :] + start[None, :]
    if GELU:
        normed *= _normal(normed)[0]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def _bias_norm_grad_kernel(
    grad: tl.tensor, x: tl.tensor, bias: tl.tensor, weight: tl.tensor, shift: tl.tensor,
    grad_x: tl.tensor, partial: tl.tensor, rows: tl.tensor, d: tl.tensor, eps: tl.tensor,
    GELU: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and this program's shares of the sums for bias, weight and shift."""
    cols = tl.arange(0, BLOCK_D)
    add = tl.load(bias + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    gain = tl.load(weight + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    start = tl.load(shift + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    grad_bias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    grad_gain = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    grad_shift = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in tl.range(TILES, num_stages=3):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (cols < d)[None, :]
        at = row[:, None] * d + cols[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + add
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        centred, rstd = _centre(value, inside, d, eps)
        normed = centred * rstd[:, None]
        if GELU:
            before = normed * gain + start
            share, bell = _normal(before)
            g *= share + before * bell * 0.39894228  # 1 / sqrt(2 pi)
        inner = g * gain
        along = tl.sum(inner * normed, 1) / d
        result = (inner - (tl.sum(inner, 1) / d)[:, None] - normed * along[:, None]) * rstd[:, None]
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)
        grad_bias += result
        grad_gain += g * normed
        grad_shift += g
    part = partial + tl.program_id(0).to(tl.int64) * 3 * d + cols
    tl.store(part, tl.sum(grad_bias, 0), mask=cols < d)
    tl.store(part + d, tl.sum(grad_gain, 0), mask=cols < d)
    tl.store(part + 2 * d, tl.sum(grad_shift, 0), mask=cols < d)


@lru_cache(SIZES)
def _launch(
    rows: int, d: int, eps: float, gelu: bool, backward: bool
) -> tuple[Callable[..., None], tuple[int]]:
    """The kernel for (rows, d) as a function of its tensors, and its grid."""
    if d > MAX_D:
        raise ValueError(f"bias_norm: expected at most {MAX_D} channels on CUDA, got {d}")
    tile, warps = (GRAD_TILE, GRAD_WARPS) if backward else (TILE, WARPS)
    block_r, block_d = row_block(d, tile)
    warps = warps if block_r > 1 else row_warps(block_d, warps)
    sides = {"GELU": gelu, "BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": warps}
    sizes = {"rows": rows, "d": d, "eps": eps}
    if not backward:
        return _bias_norm_kernel.fixed(**sizes, **sides), (ceil_div(rows, block_r),)
    tiles = power_of_2(ceil_div(rows, block_r * MAX_PARTIALS))
    kernel = _bias_norm_grad_kernel.fixed(**sizes, **sides, TILES=tiles)
    return kernel, (ceil_div(rows, block_r * tiles),)


def forward(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """The norm of x + bias, (..., d), or its GELU; all contiguous."""
    out, d = torch.empty_like(x, dtype=out_dtype), x.shape[-1]
    if x.numel():
        kernel, grid = _launch(x.numel() // d, d, eps, gelu, False)
        with device_of(x):
            kernel(grid, x, bias, weight, shift, out)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    gelu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of [bias, weight, shift] (3, d); all contiguous.

    Partial sums add up in a fixed order.
    """
    grad_x, d = torch.empty_like(x), x.shape[-1]
    if not x.numel():
        return grad_x, weight.new_zeros((3, d))
    kernel, grid = _launch(x.numel() // d, d, eps, gelu, True)
    partial = x.new_empty((*grid, 3, d), dtype=torch.float32)
    with device_of(x):
        kernel(grid, grad, x, bias, weight, shift, grad_x, partial)
    return grad_x, partial.sum(0).to(weight.dtype)
