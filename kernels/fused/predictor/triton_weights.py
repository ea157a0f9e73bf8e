"""Triton kernel of the gradients of a layer: a product over all tokens, in parts."""

from __future__ import annotations

import triton
import triton.language as tl

from quadmamba.kernels.fused.predictor.triton import _gelu, _put, _stats, _tile


@triton.jit(do_not_specialize=["rows", "tiles"])
def _weight_grad_kernel(
    g: tl.tensor, source: tl.tensor, stats: tl.tensor, out: tl.tensor, bias: tl.tensor,
    stride: tl.tensor, rows: tl.tensor, tiles: tl.tensor, width_g: tl.constexpr,
    width: tl.constexpr,
    NORM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DA: tl.constexpr, DB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's matrix and bias over `tiles` tiles of tokens: g^T [h, 1].

    h, the layer's input: standardised tokens with NORM, else the GELU of the layer before. This
    program has BLOCK_N of its columns and all of g, in two parts where SPLIT says so. The sums of
    g are products with a matrix of ones.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ja, jb = tl.arange(0, DA), DA + tl.arange(0, DB)
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
    at = tl.program_id(1).to(tl.int64) * stride
    _put(out + at, ja, n, width_g, width, out_a)
    if SPLIT:
        _put(out + at, jb, n, width_g, width, out_b)
    if tl.program_id(0) == 0:
        tl.store(bias + at + ja, tl.max(sum_a, 1), mask=ja < width_g)
        if SPLIT:
            tl.store(bias + at + jb, tl.max(sum_b, 1), mask=jb < width_g)
