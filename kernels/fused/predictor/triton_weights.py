"""Triton kernels of the gradients of a layer, a product over all tokens: in parts, then added."""

from __future__ import annotations

import triton.language as tl

from quadmamba.kernels.fused.jit import jit
from quadmamba.kernels.fused.predictor.triton import _gelu, _put, _stats, _tile


@jit(do_not_specialize=["rows", "tiles"])
def _weight_grad_kernel(
    g: tl.tensor, source: tl.tensor, stats: tl.tensor, partial: tl.tensor, out_at: tl.tensor,
    bias_at: tl.tensor, stride: tl.tensor, rows: tl.tensor, tiles: tl.tensor,
    width_g: tl.constexpr, width: tl.constexpr,
    NORM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DA: tl.constexpr, DB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's matrix and bias over `tiles` tiles of tokens: g^T [h, 1].

    h, the layer's input: standardised tokens with NORM, else the GELU of the layer before. This
    program has BLOCK_N of its columns and DA of g, or all of g in two where SPLIT says so. The sums
    of g are products with a matrix of ones.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ja, jb = tl.program_id(2) * DA + tl.arange(0, DA), DA + tl.arange(0, DB)
    row = tl.arange(0, BLOCK_M)
    half = g.dtype.element_ty
    ones = tl.full((BLOCK_M, 16), 1.0, half)
    out_a, sum_a = tl.zeros((DA, BLOCK_N), tl.float32), tl.zeros((DA, 16), tl.float32)
    out_b, sum_b = tl.zeros((DB, BLOCK_N), tl.float32), tl.zeros((DB, 16), tl.float32)
    for tile in tl.range(tiles, num_stages=STAGES):
        first = (tl.program_id(1).to(tl.int64) * tiles + tile) * BLOCK_M
        left = rows - first
        h = _tile(source + first * width, row, n, left, width).to(tl.float32)
        if NORM:
            rstd, shift = _stats(stats + 2 * first, row, left)
            h = h * rstd + shift
        else:
            h = _gelu(h)
        h = h.to(half)
        g_t = tl.trans(_tile(g + first * width_g, row, ja, left, width_g))
        out_a, sum_a = tl.dot(g_t, h, out_a), tl.dot(g_t, ones, sum_a)
        if SPLIT:
            g_t = tl.trans(_tile(g + first * width_g, row, jb, left, width_g))
            out_b, sum_b = tl.dot(g_t, h, out_b), tl.dot(g_t, ones, sum_b)
    part = partial + tl.program_id(1).to(tl.int64) * stride
    _put(part + out_at, ja, n, width_g, width, out_a)
    if SPLIT:
        _put(part + out_at, jb, n, width_g, width, out_b)
    if tl.program_id(0) == 0:
        tl.store(part + bias_at + ja, tl.max(sum_a, 1), mask=ja < width_g)
        if SPLIT:
            tl.store(part + bias_at + jb, tl.max(sum_b, 1), mask=jb < width_g)


@jit(do_not_specialize=["parts", "programs"])
def _sum_kernel(
    partial: tl.tensor, head: tl.tensor, totals: tl.tensor, parts: tl.tensor, size: tl.tensor,
    programs: tl.tensor, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of partial (parts, size), then over the columns of head (·, programs)."""
    index = tl.program_id(0) - tl.cdiv(size, BLOCK_C)
    start = 0
    if index < 0:
        cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        while start < parts:
            total += _tile(partial, start + tl.arange(0, BLOCK_R), cols, parts, size)
            start += BLOCK_R
        tl.store(totals + cols, tl.sum(total, 0), mask=cols < size)
    else:
        along = tl.zeros((BLOCK,), tl.float32)
        while start < programs:
            at = start + tl.arange(0, BLOCK)
            along += tl.load(head + index * programs + at, mask=at < programs, other=0.0)
            start += BLOCK
        tl.store(totals + size + index, tl.sum(along, 0))
