"""Triton kernels of the predictor: a program takes a block of tokens through the whole chain.

The matrices are multiplied on the tensor cores in half precision with float32 sums. The norm's
weight and bias are folded into the first layer. Tensors of a width that is no power of two come in
two parts, a and b, one power of two and the rest (192 = 128 + 64): KA + KB cover d, DA + DB cover
d2, and SPLIT says that there is a part b.

Every matrix on the right of a product is read with the summed index contiguous; backward has
transposed copies for that.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _put_matrix(
    out: tl.tensor,
    transposed: tl.tensor,
    i: tl.tensor,
    cols: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    w: tl.tensor,
    TRANSPOSE: tl.constexpr,
):
    """Row i of a (rows, width) matrix, and column i of its transpose."""
    w = w.to(out.dtype.element_ty)
    tl.store(out + i * width + cols, w, mask=cols < width)
    if TRANSPOSE:
        tl.store(transposed + cols * rows + i, w, mask=cols < width)


@triton.jit
def _fold_kernel(
    gain: tl.tensor, shift: tl.tensor, w1: tl.tensor, b1: tl.tensor, w2: tl.tensor, w3: tl.tensor,
    out: tl.tensor, bias: tl.tensor, d: tl.tensor, d2: tl.tensor, d4: tl.tensor,
    TRANSPOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of the three matrices to half precision, the norm folded into the first."""
    i = tl.program_id(0)
    size = d * d + d2 * d + d4 * d2
    total = 0.0
    start = 0
    while start < d:
        cols = start + tl.arange(0, BLOCK)
        if i < d:
            w = tl.load(w1 + i * d + cols, mask=cols < d, other=0.0).to(tl.float32)
            total += tl.sum(w * tl.load(shift + cols, mask=cols < d, other=0.0).to(tl.float32), 0)
            w *= tl.load(gain + cols, mask=cols < d, other=0.0).to(tl.float32)
            _put_matrix(out, out + size, i, cols, d, d, w, TRANSPOSE)
        if i < d2:
            w = tl.load(w2 + i * d + cols, mask=cols < d, other=0.0).to(tl.float32)
            at = out + d * d
            _put_matrix(at, at + size, i, cols, d2, d, w, TRANSPOSE)
        if i < d4:
            w = tl.load(w3 + i * d2 + cols, mask=cols < d2, other=0.0).to(tl.float32)
            at = out + d * d + d2 * d
            _put_matrix(at, at + size, i, cols, d4, d2, w, TRANSPOSE)
        start += BLOCK
    if i < d:
        tl.store(bias + i, total + tl.load(b1 + i).to(tl.float32))


@triton.jit
def _tail(x: tl.tensor):
    """Upper tail of the normal distribution at |x|, 2 to a polynomial fitted over 0..8.

    Largest error of |x| times it: 9e-7, of it: 2.4e-5; both far below half precision.
    """
    a = tl.abs(x)
    power = -5.138002543e-02 + a * (6.903870761e-03 - a * 4.471381499e-04)
    power = -1.000070250 + a * (-1.150565358 + a * (-4.604775141e-01 + a * power))
    return tl.exp2(power)


@triton.jit
def _gelu(x: tl.tensor):
    return tl.maximum(x, 0.0) - tl.abs(x) * _tail(x)


@triton.jit
def _gelu_and_slope(x: tl.tensor):
    tail = _tail(x)
    density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
    slope = tl.where(x > 0, 1.0 - tail, tail) + x * density
    return tl.maximum(x, 0.0) - tl.abs(x) * tail, slope


@triton.jit
def _vector(pointer: tl.tensor, index: tl.tensor, end: tl.tensor):
    return tl.load(pointer + index, mask=index < end, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _matrix(
    pointer: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    stride_i: tl.tensor,
    stride_j: tl.tensor,
):
    """Entries (i, j) of a matrix, zero beyond its sides: (len i, len j)."""
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    return tl.load(pointer + i[:, None] * stride_i + j[None, :] * stride_j, mask=inside, other=0.0)


@triton.jit
def _tokens(x: tl.tensor, row: tl.tensor, cols: tl.tensor, rows: tl.tensor, d: tl.tensor):
    """Tokens `row` at channels `cols` in float32, and which channels are real."""
    inside = (row < rows)[:, None] & (cols < d)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * d + cols[None, :], mask=inside, other=0.0)
    return value.to(tl.float32), (cols < d)[None, :]


@triton.jit
def _standardise(
    x: tl.tensor,
    row: tl.tensor,
    ka: tl.tensor,
    kb: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    eps: tl.tensor,
    SPLIT: tl.constexpr,
):
    """Both parts of the tokens less their mean over their deviation, and 1 / deviation (row)."""
    xa, real_a = _tokens(x, row, ka, rows, d)
    xb, real_b = xa, real_a
    total = tl.sum(xa, 1)
    if SPLIT:
        xb, real_b = _tokens(x, row, kb, rows, d)
        total += tl.sum(xb, 1)
    mean = (total / d)[:, None]
    xa = tl.where(real_a, xa - mean, 0.0)
    square = tl.sum(xa * xa, 1)
    if SPLIT:
        xb = tl.where(real_b, xb - mean, 0.0)
        square += tl.sum(xb * xb, 1)
    rstd = tl.rsqrt(square / d + eps)
    half = x.dtype.element_ty
    return (xa * rstd[:, None]).to(half), (xb * rstd[:, None]).to(half), rstd


@triton.jit
def _times(
    xa: tl.tensor,
    xb: tl.tensor,
    w: tl.tensor,
    ka: tl.tensor,
    kb: tl.tensor,
    j: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    stride_k: tl.tensor,
    stride_j: tl.tensor,
    SPLIT: tl.constexpr,
):
    """(xa, xb) times the columns j of a matrix with rows ka, kb."""
    out = tl.dot(xa, _matrix(w, ka, j, rows, cols, stride_k, stride_j))
    if SPLIT:
        out = tl.dot(xb, _matrix(w, kb, j, rows, cols, stride_k, stride_j), out)
    return out


@triton.jit
def _head(h3: tl.tensor, w4: tl.tensor, b4: tl.tensor, j4: tl.tensor, d4: tl.tensor):
    """Second logit less the first, and the row of the last layer that gives it."""
    w4_gap = _vector(w4 + d4, j4, d4) - _vector(w4, j4, d4)
    return tl.sum(h3 * w4_gap, 1) + (tl.load(b4 + 1) - tl.load(b4)).to(tl.float32), w4_gap


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x: tl.tensor, matrices: tl.tensor, b1: tl.tensor, b2: tl.tensor, b3: tl.tensor, w4: tl.tensor,
    b4: tl.tensor, score: tl.tensor, rows: tl.tensor, d: tl.tensor, d2: tl.tensor, d4: tl.tensor,
    eps: tl.tensor,
    SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, D4: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ka, kb, j4 = tl.arange(0, KA), KA + tl.arange(0, KB), tl.arange(0, D4)
    ja, jb = tl.arange(0, DA), DA + tl.arange(0, DB)
    w1, w2, w3 = matrices, matrices + d * d, matrices + d * d + d2 * d
    half = matrices.dtype.element_ty
    na, nb, _ = _standardise(x, row, ka, kb, rows, d, eps, SPLIT)
    p2a = tl.zeros((BLOCK_M, DA), tl.float32)
    p2b = tl.zeros((BLOCK_M, DB), tl.float32)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        p1 = _times(na, nb, w1, ka, kb, n, d, d, 1, d, SPLIT) + _vector(b1, n, d)
        h1 = _gelu(p1).to(half)
        p2a = tl.dot(h1, _matrix(w2, n, ja, d, d2, 1, d), p2a)
        if SPLIT:
            p2b = tl.dot(h1, _matrix(w2, n, jb, d, d2, 1, d), p2b)
    h2a = _gelu(p2a + _vector(b2, ja, d2)).to(half)
    h2b = _gelu(p2b + _vector(b2, jb, d2)).to(half) if SPLIT else h2a
    p3 = _times(h2a, h2b, w3, ja, jb, j4, d2, d4, 1, d2, SPLIT) + _vector(b3, j4, d4)
    z, _ = _head(_gelu(p3), w4, b4, j4, d4)
    softplus = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
    tl.store(score + row, -softplus, mask=row < rows)


@triton.jit
def _put(
    pointer: tl.tensor,
    row: tl.tensor,
    cols: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    value: tl.tensor,
):
    """Store value at the given rows and columns of a (rows, width) tensor."""
    inside = (row < rows)[:, None] & (cols < width)[None, :]
    at = row.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _put_ones(
    pointer: tl.tensor, row: tl.tensor, rows: tl.tensor, width: tl.tensor, ONES: tl.constexpr
):
    """The added columns: one of ones, the rest zero."""
    extra = tl.arange(0, ONES)
    value = tl.where(extra == 0, 1.0, 0.0)[None, :] + tl.zeros_like(row).to(tl.float32)[:, None]
    _put(pointer + width, row, extra, rows, ONES, width + ONES, value)


@triton.jit(do_not_specialize=["rows"])
def _recompute_kernel(
    grad: tl.tensor, x: tl.tensor, matrices: tl.tensor, b1: tl.tensor, b2: tl.tensor, b3: tl.tensor,
    w4: tl.tensor, b4: tl.tensor, normed: tl.tensor, h1: tl.tensor, slope1: tl.tensor,
    h2: tl.tensor, g2: tl.tensor, g3: tl.tensor, partial: tl.tensor,
    rows: tl.tensor, d: tl.tensor, d2: tl.tensor, d4: tl.tensor, eps: tl.tensor,
    SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, D4: tl.constexpr,
    ONES: tl.constexpr,
):  # fmt: skip
    """Activations h, the first GELU's slope, and the gradients g before the last two GELUs."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ka, kb, j4 = tl.arange(0, KA), KA + tl.arange(0, KB), tl.arange(0, D4)
    ja, jb = tl.arange(0, DA), DA + tl.arange(0, DB)
    w1, w2, w3 = matrices, matrices + d * d, matrices + d * d + d2 * d
    w3_t = w3 + d * d + d2 * d + d4 * d2
    half = matrices.dtype.element_ty
    na, nb, _ = _standardise(x, row, ka, kb, rows, d, eps, SPLIT)
    _put(normed, row, ka, rows, d, d + ONES, na)
    if SPLIT:
        _put(normed, row, kb, rows, d, d + ONES, nb)
    _put_ones(normed, row, rows, d, ONES)
    _put_ones(h1, row, rows, d, ONES)
    _put_ones(h2, row, rows, d2, ONES)
    p2a = tl.zeros((BLOCK_M, DA), tl.float32)
    p2b = tl.zeros((BLOCK_M, DB), tl.float32)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        p1 = _times(na, nb, w1, ka, kb, n, d, d, 1, d, SPLIT) + _vector(b1, n, d)
        act1, slope = _gelu_and_slope(p1)
        _put(h1, row, n, rows, d, d + ONES, act1)
        _put(slope1, row, n, rows, d, d, slope)
        p2a = tl.dot(act1.to(half), _matrix(w2, n, ja, d, d2, 1, d), p2a)
        if SPLIT:
            p2b = tl.dot(act1.to(half), _matrix(w2, n, jb, d, d2, 1, d), p2b)
    h2a, slope2a = _gelu_and_slope(p2a + _vector(b2, ja, d2))
    _put(h2, row, ja, rows, d2, d2 + ONES, h2a)
    h2b, slope2b = h2a, slope2a
    if SPLIT:
        h2b, slope2b = _gelu_and_slope(p2b + _vector(b2, jb, d2))
        _put(h2, row, jb, rows, d2, d2 + ONES, h2b)
    p3 = _times(h2a.to(half), h2b.to(half), w3, ja, jb, j4, d2, d4, 1, d2, SPLIT)
    act3, slope3 = _gelu_and_slope(p3 + _vector(b3, j4, d4))
    z, w4_gap = _head(act3, w4, b4, j4, d4)
    gz = -tl.load(grad + row, mask=row < rows, other=0.0) / (1.0 + tl.exp(-z))
    part = partial + tl.program_id(0).to(tl.int64) * (d4 + 1)
    tl.store(part + j4, tl.sum(gz[:, None] * act3, 0), mask=j4 < d4)
    tl.store(part + d4, tl.sum(gz, 0))
    grad3 = (gz[:, None] * w4_gap * slope3).to(half)
    _put(g3, row, j4, rows, d4, d4, grad3)
    grad2 = tl.dot(grad3, _matrix(w3_t, j4, ja, d4, d2, 1, d4)) * slope2a
    _put(g2, row, ja, rows, d2, d2, grad2)
    if SPLIT:
        grad2 = tl.dot(grad3, _matrix(w3_t, j4, jb, d4, d2, 1, d4)) * slope2b
        _put(g2, row, jb, rows, d2, d2, grad2)


@triton.jit(do_not_specialize=["rows"])
def _input_grad_kernel(
    x: tl.tensor, matrices: tl.tensor, g2: tl.tensor, slope1: tl.tensor, grad_x: tl.tensor,
    rows: tl.tensor, d: tl.tensor, d2: tl.tensor, d4: tl.tensor, eps: tl.tensor,
    SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    """From g2 to the gradient before the first GELU, written over its slope, and that of x."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ka, kb = tl.arange(0, KA), KA + tl.arange(0, KB)
    ja, jb = tl.arange(0, DA), DA + tl.arange(0, DB)
    w1_t = matrices + d * d + d2 * d + d4 * d2
    w2_t = w1_t + d * d
    half = matrices.dtype.element_ty
    g2a = _tokens(g2, row, ja, rows, d2)[0].to(half)
    g2b = _tokens(g2, row, jb, rows, d2)[0].to(half) if SPLIT else g2a
    grad_a = tl.zeros((BLOCK_M, KA), tl.float32)
    grad_b = tl.zeros((BLOCK_M, KB), tl.float32)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        slope = _tokens(slope1, row, n, rows, d)[0]
        grad1 = (_times(g2a, g2b, w2_t, ja, jb, n, d2, d, 1, d2, SPLIT) * slope).to(half)
        _put(slope1, row, n, rows, d, d, grad1)
        grad_a = tl.dot(grad1, _matrix(w1_t, n, ka, d, d, 1, d), grad_a)
        if SPLIT:
            grad_b = tl.dot(grad1, _matrix(w1_t, n, kb, d, d, 1, d), grad_b)
    na, nb, rstd = _standardise(x, row, ka, kb, rows, d, eps, SPLIT)
    inner, along = tl.sum(grad_a, 1), tl.sum(grad_a * na, 1)
    if SPLIT:
        inner += tl.sum(grad_b, 1)
        along += tl.sum(grad_b * nb, 1)
    inner, along, rstd = (inner / d)[:, None], (along / d)[:, None], rstd[:, None]
    _put(grad_x, row, ka, rows, d, d, (grad_a - inner - na * along) * rstd)
    if SPLIT:
        _put(grad_x, row, kb, rows, d, d, (grad_b - inner - nb * along) * rstd)
