"""Triton kernels between the matrix products of the predictor, for tokens of any width.

Each reads and writes every tensor once.
"""

from __future__ import annotations

import triton.language as tl

from quadmamba.kernels.fused.jit import jit
from quadmamba.kernels.fused.predictor.triton import (
    _gelu,
    _head,
    _head_grad,
    _put,
    _put_head_sums,
    _put_stats,
    _score,
    _slope,
    _stats,
    _tile,
)


@jit(do_not_specialize=["rows"])
def _standardise_kernel(
    x: tl.tensor, normed: tl.tensor, stats: tl.tensor, rows: tl.tensor, d: tl.tensor,
    eps: tl.tensor, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each token less its mean over its deviation."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, cols, left = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), rows - first
    value = _tile(x + first * d, row, cols, left, d).to(tl.float32)
    mean = tl.sum(value, 1) / d
    value = tl.where((cols < d)[None, :], value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(value * value, 1) / d + eps)
    _put(normed + first * d, row, cols, left, d, value * rstd[:, None])
    _put_stats(stats + 2 * first, row, left, mean, rstd)


@jit(do_not_specialize=["rows"])
def _standardise_grad_kernel(
    x: tl.tensor, stats: tl.tensor, grad: tl.tensor, out: tl.tensor, rows: tl.tensor,
    d: tl.tensor, ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of x from that of the standardised tokens; with ADD added to what out holds."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, cols, left = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), rows - first
    rstd, shift = _stats(stats + 2 * first, row, left)
    value = _tile(x + first * d, row, cols, left, d).to(tl.float32) * rstd + shift
    g = _tile(grad + first * d, row, cols, left, d).to(tl.float32)
    mean, along = (tl.sum(g, 1) / d)[:, None], (tl.sum(g * value, 1) / d)[:, None]
    g = (g - mean - value * along) * rstd
    out += first * d
    if ADD:
        g += _tile(out, row, cols, left, d).to(tl.float32)
    _put(out, row, cols, left, d, g)


@jit()
def _layer_gelu_kernel(pre: tl.tensor, act: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at, left = tl.arange(0, BLOCK), size - first
    value = _gelu(tl.load(pre + first + at, mask=at < left, other=0.0).to(tl.float32))
    tl.store(act + first + at, value.to(act.dtype.element_ty), mask=at < left)


@jit()
def _layer_gelu_grad_kernel(pre: tl.tensor, grad: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr):
    """Gradient of pre over that of its GELU."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at, left = tl.arange(0, BLOCK), size - first
    slope = _slope(tl.load(pre + first + at, mask=at < left, other=0.0).to(tl.float32))
    value = tl.load(grad + first + at, mask=at < left, other=0.0).to(tl.float32) * slope
    tl.store(grad + first + at, value.to(grad.dtype.element_ty), mask=at < left)


@jit(do_not_specialize=["rows"])
def _head_kernel(
    p3: tl.tensor, w4: tl.tensor, b4: tl.tensor, score: tl.tensor, rows: tl.tensor, d4: tl.tensor,
    BLOCK_R: tl.constexpr, D4: tl.constexpr,
):  # fmt: skip
    """Score of each token from the layer before the last."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, j4, left = tl.arange(0, BLOCK_R), tl.arange(0, D4), rows - first
    act = _gelu(_tile(p3 + first * d4, row, j4, left, d4).to(tl.float32))
    z, _ = _head(act, w4, b4, j4, d4)
    tl.store(score + first + row, _score(z), mask=row < left)


@jit(do_not_specialize=["rows"])
def _head_grad_kernel(
    grad: tl.tensor, p3: tl.tensor, w4: tl.tensor, b4: tl.tensor, g3: tl.tensor,
    partial: tl.tensor, rows: tl.tensor, d4: tl.tensor,
    TILES: tl.constexpr, BLOCK_R: tl.constexpr, D4: tl.constexpr,
):  # fmt: skip
    """Gradient before the last GELU, and the sums for w4 and b4 over TILES tiles of tokens."""
    row, j4 = tl.arange(0, BLOCK_R), tl.arange(0, D4)
    for_w4, for_b4 = tl.zeros((D4,), tl.float32), 0.0
    for tile in range(TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_R
        left = rows - first
        g, w4_sum, b4_sum = _head_grad(grad + first, p3 + first * d4, w4, b4, row, left, j4, d4)
        _put(g3 + first * d4, row, j4, left, d4, g)
        for_w4, for_b4 = for_w4 + w4_sum, for_b4 + b4_sum
    _put_head_sums(partial, j4, d4, for_w4, for_b4)
