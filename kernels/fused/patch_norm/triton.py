"""Triton kernels of `patch_norm`: a product of the image's patches and the filters, and its norm.

A program has tiles of the result, TILE_Y by TILE_X pixels. The patch of a pixel, 3 x 3 pixels of
the image around it, is K numbers, a power of two: number k is channel k % c_in of pixel k // c_in.
It is gathered as it lies in the image, three runs of numbers, and never written. N columns, another
power of two, cover the c channels of the result. Zeros in the columns beyond c are constants to the
compiler, which then computes nothing there. Backward computes everything anew from the image.
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
from quadmamba.kernels.fused.layer_norm.triton import _centre
from quadmamba.kernels.fused.mlp.triton import _normal
from quadmamba.kernels.fused.patch_norm.reference import halved

FORWARD = {"TILE_Y": 4, "TILE_X": 16, "STAGES": 1, "num_warps": 4}
BACKWARD = {"TILE_Y": 4, "TILE_X": 16, "STAGES": 1, "num_warps": 4}  # 128 pixels spill registers
PROGRAMS, GRAD_PROGRAMS = 132 * 16, 132 * 4  # most of them: each reads the filters, or sums apart


@triton.jit
def _place(tile: tl.tensor, h: tl.tensor, w: tl.tensor, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Image of a tile, and the row and column of the result, (h, w), where it begins."""
    across, down = tl.cdiv(w, TILE_X), tl.cdiv(h, TILE_Y)
    image = tile // (across * down)
    return image.to(tl.int64), (tile // across) % down * TILE_Y, tile % across * TILE_X


@triton.jit
def _patches(
    x: tl.tensor, image: tl.tensor, y0: tl.tensor, x0: tl.tensor, dy: tl.tensor, dx: tl.tensor,
    h: tl.tensor, w: tl.tensor, c_in: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Patches (K, pixels) at y0 + dy, x0 + dx of the result, zero outside the image (h, w).

    Pixels come last, as Triton then lets the threads of a warp read the numbers of one patch.
    """
    k = tl.arange(0, K)
    i, along = k // (3 * c_in), k % (3 * c_in)
    top, left = 2 * y0 - 1, 2 * x0 - 1
    row = (top + 2 * dy)[None, :] + i[:, None]
    col = (left + 2 * dx)[None, :] + (along // c_in)[:, None]
    # Without a sign what is less than 0 is beyond the image too.
    inside = (row.to(tl.uint32) < h.to(tl.uint32)) & (col.to(tl.uint32) < w.to(tl.uint32))
    inside &= (k < 9 * c_in)[:, None]
    first = x + ((image * h + top) * w + left) * c_in
    at = ((dy * w + dx) * (2 * c_in))[None, :] + (i * w * c_in + along)[:, None]
    return tl.load(first + at, mask=inside, other=0.0)


@triton.jit
def _filter_at(k: tl.tensor, cols: tl.tensor, c_in: tl.constexpr):
    """Where number k of the filters cols lies in (c, c_in, 3, 3)."""
    return ((k % c_in) * 9 + k // c_in)[:, None] + (cols * (9 * c_in))[None, :]


@triton.jit
def _vector(pointer: tl.tensor, cols: tl.tensor, c: tl.constexpr):
    return tl.load(pointer + cols, mask=cols < c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _fold(x: tl.tensor):
    """Sums of pairs of rows eight apart, (rows, N) to (rows / 16, 8, N): one thread has both."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1])), 1)


@jit(do_not_specialize=["h", "w", "total", "tiles"])
def _patch_norm_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, gain: tl.tensor, shift: tl.tensor,
    out: tl.tensor, h: tl.tensor, w: tl.tensor, total: tl.tensor, tiles: tl.tensor, eps: tl.tensor,
    c_in: tl.constexpr, c: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of the `total` ones."""
    half = out.dtype.element_ty
    k, cols, pixel = tl.arange(0, K), tl.arange(0, N), tl.arange(0, TILE_Y * TILE_X)
    dy, dx = pixel // TILE_X, pixel % TILE_X
    exist = (k < 9 * c_in)[:, None] & (cols < c)[None, :]
    filters = tl.load(weight + _filter_at(k, cols, c_in), mask=exist, other=0.0).to(half)
    add, scale, start = _vector(bias, cols, c), _vector(gain, cols, c), _vector(shift, cols, c)
    real = (cols < c)[None, :]
    h2, w2, first = (h + 1) // 2, (w + 1) // 2, tl.program_id(0) * tiles
    for tile in tl.range(first, tl.minimum(first + tiles, total), num_stages=STAGES):
        image, y0, x0 = _place(tile, h2, w2, TILE_Y, TILE_X)
        patches = _patches(x, image, y0, x0, dy, dx, h, w, c_in, K).to(half)
        live = (y0 + dy < h2) & (x0 + dx < w2)
        inside = live[:, None] & real
        centred, rstd = _centre(tl.dot(tl.trans(patches), filters) + add, inside, c, eps)
        normed = centred * rstd[:, None] * scale + start
        normed = tl.where(real, normed, 0.0)
        normed *= _normal(normed)[0]
        at = (dy * w2 + dx)[:, None] * c + cols[None, :]
        place = out + ((image * h2 + y0) * w2 + x0) * c
        tl.store(place + at, normed.to(half), mask=inside)


@jit(do_not_specialize=["h", "w", "total", "tiles"])
def _patch_norm_grad_kernel(
    grad: tl.tensor, x: tl.tensor, weight: tl.tensor, bias: tl.tensor, gain: tl.tensor,
    shift: tl.tensor, partial: tl.tensor, h: tl.tensor, w: tl.tensor, total: tl.tensor,
    tiles: tl.tensor, eps: tl.tensor,
    c_in: tl.constexpr, c: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program's shares of the sums for weight, bias, gain and shift, a row of `partial`."""
    half = grad.dtype.element_ty
    k, cols, pixel = tl.arange(0, K), tl.arange(0, N), tl.arange(0, TILE_Y * TILE_X)
    dy, dx = pixel // TILE_X, pixel % TILE_X
    exist = (k < 9 * c_in)[:, None] & (cols < c)[None, :]
    filters = tl.load(weight + _filter_at(k, cols, c_in), mask=exist, other=0.0).to(half)
    add, scale, start = _vector(bias, cols, c), _vector(gain, cols, c), _vector(shift, cols, c)
    grad_weight = tl.zeros((N, K), tl.float32)
    grad_bias = tl.zeros((TILE_Y * TILE_X // 16, 8, N), tl.float32)
    grad_gain = tl.zeros((TILE_Y * TILE_X // 16, 8, N), tl.float32)
    grad_shift = tl.zeros((TILE_Y * TILE_X // 16, 8, N), tl.float32)
    real = (cols < c)[None, :]
    h2, w2, first = (h + 1) // 2, (w + 1) // 2, tl.program_id(0) * tiles
    for tile in tl.range(first, tl.minimum(first + tiles, total), num_stages=STAGES):
        image, y0, x0 = _place(tile, h2, w2, TILE_Y, TILE_X)
        patches = _patches(x, image, y0, x0, dy, dx, h, w, c_in, K).to(half)
        live = (y0 + dy < h2) & (x0 + dx < w2)
        inside = live[:, None] & real
        at = (dy * w2 + dx)[:, None] * c + cols[None, :]
        place = grad + ((image * h2 + y0) * w2 + x0) * c
        g = tl.load(place + at, mask=inside, other=0.0).to(tl.float32)
        centred, rstd = _centre(tl.dot(tl.trans(patches), filters) + add, inside, c, eps)
        rstd = tl.where(live, rstd, 0.0)  # no share in the sums, where eps is 0 either
        normed = centred * rstd[:, None]
        before = normed * scale + start
        share, bell = _normal(before)
        g *= share + before * bell * 0.39894228  # 1 / sqrt(2 pi)
        g = tl.where(real, g, 0.0)
        inner = g * scale
        along = tl.sum(inner * normed, 1) / c
        result = (inner - (tl.sum(inner, 1) / c)[:, None] - normed * along[:, None]) * rstd[:, None]
        result = tl.where(real, result, 0.0)
        grad_weight = tl.dot(tl.trans(result.to(half)), tl.trans(patches), grad_weight)
        grad_bias += _fold(result)
        grad_gain += _fold(g * normed)
        grad_shift += _fold(g)
    part = partial + tl.program_id(0).to(tl.int64) * ((9 * c_in + 3) * c)
    tl.store(part + _filter_at(k, cols, c_in), tl.trans(grad_weight), mask=exist)
    part += 9 * c_in * c + cols
    tl.store(part, tl.sum(tl.sum(grad_bias, 0), 0), mask=cols < c)
    tl.store(part + c, tl.sum(tl.sum(grad_gain, 0), 0), mask=cols < c)
    tl.store(part + 2 * c, tl.sum(tl.sum(grad_shift, 0), 0), mask=cols < c)


@lru_cache(SIZES)
def _launch(
    shape: tuple[int, int, int, int], c: int, eps: float, backward: bool
) -> tuple[Callable[..., None], tuple[int]]:
    """The kernel for images (b, H, W, c_in) as a function of its tensors, and its grid."""
    b, h, w, c_in = shape
    sides, most = (BACKWARD, GRAD_PROGRAMS) if backward else (FORWARD, PROGRAMS)
    down, across = ceil_div(halved(h), sides["TILE_Y"]), ceil_div(halved(w), sides["TILE_X"])
    total = b * down * across
    tiles = ceil_div(total, most)
    sizes = {"h": h, "w": w, "total": total, "tiles": tiles, "eps": eps, "c_in": c_in, "c": c}
    widths = {"K": max(16, power_of_2(9 * c_in)), "N": max(16, power_of_2(c))}
    kernel = _patch_norm_grad_kernel if backward else _patch_norm_kernel
    return kernel.fixed(**sizes, **widths, **sides), (ceil_div(total, tiles),)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The result of `patch_norm` in `dtype`, a half precision; all contiguous."""
    (b, h, w, _), c = x.shape, weight.shape[0]
    out = x.new_empty((b, halved(h), halved(w), c), dtype=dtype)
    if b:
        kernel, grid = _launch(tuple(x.shape), c, eps, False)
        with device_of(x):
            kernel(grid, x, weight, bias, gain, shift, out)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """Gradients of weight, bias, gain and shift in one row, in float32; all contiguous.

    Partial sums add up in a fixed order.
    """
    size = weight.numel() + 3 * weight.shape[0]
    if not x.shape[0]:
        return x.new_zeros(size, dtype=torch.float32)
    kernel, grid = _launch(tuple(x.shape), weight.shape[0], eps, True)
    partial = x.new_empty((*grid, size), dtype=torch.float32)
    with device_of(x):
        kernel(grid, grad, x, weight, bias, gain, shift, partial)
    return partial.sum(0)
