"""Triton kernels that take a block of tokens through the predictor's whole chain, d <= 256.

The matrices are multiplied on the tensor cores in half precision with float32 sums. Tensors of a
width that is no power of two come in two parts, a and b, one power of two and the rest (192 = 128 +
64): KA + KB cover d, DA + DB cover d2, and SPLIT says that there is a part b.

Every matrix on the right of a product is read with the summed index contiguous; backward has
transposed copies for that.
"""

from __future__ import annotations

import triton
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
    _vector,
)


@triton.jit
def _matrix(
    pointer: tl.tensor, k: tl.tensor, j: tl.tensor, rows: tl.tensor, cols: tl.tensor,
    stride: tl.tensor,
):  # fmt: skip
    """Entries (k, j) of a matrix that holds its columns in a row, zero beyond its sides."""
    inside = (k < rows)[:, None] & (j < cols)[None, :]
    return tl.load(pointer + (k[:, None] + j[None, :] * stride), mask=inside, other=0.0)


@triton.jit
def _standardise(
    x: tl.tensor, row: tl.tensor, ka: tl.tensor, kb: tl.tensor, rows: tl.tensor, d: tl.constexpr,
    eps: tl.tensor, SPLIT: tl.constexpr,
):  # fmt: skip
    """Both parts of the tokens less their mean over their deviation; mean, 1 / deviation (row)."""
    xa = _tile(x, row, ka, rows, d).to(tl.float32)
    xb = xa
    total = tl.sum(xa, 1)
    if SPLIT:
        xb = _tile(x, row, kb, rows, d).to(tl.float32)
        total += tl.sum(xb, 1)
    mean = total * (1.0 / d)
    xa = tl.where((ka < d)[None, :], xa - mean[:, None], 0.0)
    square = tl.sum(xa * xa, 1)
    if SPLIT:
        xb = tl.where((kb < d)[None, :], xb - mean[:, None], 0.0)
        square += tl.sum(xb * xb, 1)
    rstd = tl.rsqrt(square * (1.0 / d) + eps)
    return xa * rstd[:, None], xb * rstd[:, None], mean, rstd


@triton.jit
def _times(
    xa: tl.tensor, xb: tl.tensor, w: tl.tensor, ka: tl.tensor, kb: tl.tensor, j: tl.tensor,
    rows: tl.tensor, cols: tl.tensor, SPLIT: tl.constexpr,
):  # fmt: skip
    """(xa, xb) times the columns j of a matrix with rows ka, kb."""
    out = tl.dot(xa, _matrix(w, ka, j, rows, cols, rows))
    if SPLIT:
        out = tl.dot(xb, _matrix(w, kb, j, rows, cols, rows), out)
    return out


@jit(do_not_specialize=["rows"])
def _chain_kernel(
    x: tl.tensor, matrices: tl.tensor, bias: tl.tensor, w4: tl.tensor, b4: tl.tensor,
    score: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor, stats: tl.tensor,
    rows: tl.tensor, eps: tl.tensor, d: tl.constexpr, d2: tl.constexpr, d4: tl.constexpr,
    KEEP: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    D4: tl.constexpr,
):  # fmt: skip
    """Score of each token; with KEEP also the layers before their GELU."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, left = tl.arange(0, BLOCK_M), rows - first
    ka, kb, j4 = tl.arange(0, KA), KA + tl.arange(0, KB), tl.arange(0, D4)
    ja, jb = tl.arange(0, DA), DA + tl.arange(0, DB)
    w2, w3 = matrices + d * d, matrices + d * d + d2 * d
    half = matrices.dtype.element_ty
    na, nb, mean, rstd = _standardise(x + first * d, row, ka, kb, left, d, eps, SPLIT)
    na, nb = na.to(half), nb.to(half)
    if KEEP:
        _put_stats(stats + 2 * first, row, left, mean, rstd)
    p2a = tl.zeros((BLOCK_M, DA), tl.float32)
    p2b = tl.zeros((BLOCK_M, DB), tl.float32)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        pre = _times(na, nb, matrices, ka, kb, n, d, d, SPLIT) + _vector(bias, n, d)
        if KEEP:
            _put(p1 + first * d, row, n, left, d, pre)
        h1 = _gelu(pre).to(half)
        p2a = tl.dot(h1, _matrix(w2, n, ja, d, d2, d), p2a)
        if SPLIT:
            p2b = tl.dot(h1, _matrix(w2, n, jb, d, d2, d), p2b)
    p2a += _vector(bias + d, ja, d2)
    p2b += _vector(bias + d, jb, d2)
    if KEEP:
        _put(p2 + first * d2, row, ja, left, d2, p2a)
        if SPLIT:
            _put(p2 + first * d2, row, jb, left, d2, p2b)
    h2a, h2b = _gelu(p2a).to(half), _gelu(p2b).to(half)
    pre = _times(h2a, h2b, w3, ja, jb, j4, d2, d4, SPLIT) + _vector(bias + (d + d2), j4, d4)
    if KEEP:
        _put(p3 + first * d4, row, j4, left, d4, pre)
    z, _ = _head(_gelu(pre), w4, b4, j4, d4)
    tl.store(score + first + row, _score(z), mask=row < left)


@triton.jit
def _gelu_grad(
    pre: tl.tensor, grad: tl.tensor, g: tl.tensor, row: tl.tensor, cols: tl.tensor,
    rows: tl.tensor, width: tl.tensor,
):  # fmt: skip
    """Gradient of pre from that of its GELU, stored in g."""
    grad *= _slope(_tile(pre, row, cols, rows, width).to(tl.float32))
    grad = grad.to(g.dtype.element_ty)
    _put(g, row, cols, rows, width, grad)
    return grad


@jit(do_not_specialize=["rows"])
def _chain_grad_kernel(
    grad: tl.tensor, x: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor, stats: tl.tensor,
    matrices: tl.tensor, w4: tl.tensor, b4: tl.tensor, g1: tl.tensor, g2: tl.tensor,
    g3: tl.tensor, grad_x: tl.tensor, partial: tl.tensor, rows: tl.tensor,
    d: tl.constexpr, d2: tl.constexpr, d4: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    D4: tl.constexpr,
):  # fmt: skip
    """Gradients g before the GELUs, and that of x; with ADD added to what grad_x holds.

    The sums over the block's tokens for w4 and b4 are a column of `partial`.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, left = tl.arange(0, BLOCK_M), rows - first
    ka, kb, j4 = tl.arange(0, KA), KA + tl.arange(0, KB), tl.arange(0, D4)
    ja, jb = tl.arange(0, DA), DA + tl.arange(0, DB)
    w1 = matrices + d * d + d2 * d + d4 * d2  # transposed from here on
    w2, w3 = w1 + d * d, w1 + d * d + d2 * d
    half = matrices.dtype.element_ty
    grad3, for_w4, for_b4 = _head_grad(grad + first, p3 + first * d4, w4, b4, row, left, j4, d4)
    _put_head_sums(partial, j4, d4, for_w4, for_b4)
    grad3 = grad3.to(half)
    _put(g3 + first * d4, row, j4, left, d4, grad3)
    at = first * d2
    g2a = tl.dot(grad3, _matrix(w3, j4, ja, d4, d2, d4))
    g2a = _gelu_grad(p2 + at, g2a, g2 + at, row, ja, left, d2)
    g2b = g2a
    if SPLIT:
        g2b = tl.dot(grad3, _matrix(w3, j4, jb, d4, d2, d4))
        g2b = _gelu_grad(p2 + at, g2b, g2 + at, row, jb, left, d2)
    grad_a = tl.zeros((BLOCK_M, KA), tl.float32)
    grad_b = tl.zeros((BLOCK_M, KB), tl.float32)
    at = first * d
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        grad1 = _times(g2a, g2b, w2, ja, jb, n, d2, d, SPLIT)
        grad1 = _gelu_grad(p1 + at, grad1, g1 + at, row, n, left, d)
        grad_a = tl.dot(grad1, _matrix(w1, n, ka, d, d, d), grad_a)
        if SPLIT:
            grad_b = tl.dot(grad1, _matrix(w1, n, kb, d, d, d), grad_b)
    rstd, shift = _stats(stats + 2 * first, row, left)
    na = _tile(x + at, row, ka, left, d).to(tl.float32) * rstd + shift
    inner, along = tl.sum(grad_a, 1), tl.sum(grad_a * na, 1)
    nb = na
    if SPLIT:
        nb = _tile(x + at, row, kb, left, d).to(tl.float32) * rstd + shift
        inner += tl.sum(grad_b, 1)
        along += tl.sum(grad_b * nb, 1)
    inner, along = (inner / -d)[:, None] * rstd, (along / -d)[:, None] * rstd
    grad_x += at
    if SPLIT:  # part b first: the other way round more registers spill
        grad_b = grad_b * rstd + (nb * along + inner)
        if ADD:
            grad_b += _tile(grad_x, row, kb, left, d).to(tl.float32)
        _put(grad_x, row, kb, left, d, grad_b)
    grad_a = grad_a * rstd + (na * along + inner)
    if ADD:
        grad_a += _tile(grad_x, row, ka, left, d).to(tl.float32)
    _put(grad_x, row, ka, left, d, grad_a)
