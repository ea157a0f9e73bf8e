"""What the Triton kernels of the predictor share: GELU, tiles, and the matrices before and after.

Tiles are addressed from their first row, so that offsets inside a tile are 32 bits wide. The norm's
weight and bias are folded into the first layer: with n the standardised tokens

    W1 (n · gain + shift) + b1 = (W1 · gain) n + (b1 + W1 shift)

so no kernel between these two ends knows of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quadmamba.kernels.fused.jit import jit


@triton.jit
def _put_matrix(
    out: tl.tensor,
    transposed: tl.tensor,
    i: tl.tensor,
    cols: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    w: tl.tensor,
):
    """Row i of a (rows, width) matrix, and column i of its transpose."""
    w = w.to(out.dtype.element_ty)
    tl.store(out + i * width + cols, w, mask=cols < width)
    tl.store(transposed + cols * rows + i, w, mask=cols < width)


@jit()
def _fold_kernel(
    gain: tl.tensor, shift: tl.tensor, w1: tl.tensor, b1: tl.tensor, w2: tl.tensor, b2: tl.tensor,
    w3: tl.tensor, b3: tl.tensor, out: tl.tensor, bias: tl.tensor, d: tl.tensor, d2: tl.tensor,
    d4: tl.tensor, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of the three matrices, of their transposes and of the biases, the norm folded in."""
    i = tl.program_id(0)
    size = d * d + d2 * d + d4 * d2
    total = 0.0
    start = 0
    while (start < d) | (start < d2):
        cols = start + tl.arange(0, BLOCK)
        if i < d:
            w = tl.load(w1 + i * d + cols, mask=cols < d, other=0.0).to(tl.float32)
            total += tl.sum(w * tl.load(shift + cols, mask=cols < d, other=0.0).to(tl.float32), 0)
            w *= tl.load(gain + cols, mask=cols < d, other=0.0).to(tl.float32)
            _put_matrix(out, out + size, i, cols, d, d, w)
        if i < d2:
            w = tl.load(w2 + i * d + cols, mask=cols < d, other=0.0).to(tl.float32)
            at = out + d * d
            _put_matrix(at, at + size, i, cols, d2, d, w)
        if i < d4:
            w = tl.load(w3 + i * d2 + cols, mask=cols < d2, other=0.0).to(tl.float32)
            at = out + d * d + d2 * d
            _put_matrix(at, at + size, i, cols, d4, d2, w)
        start += BLOCK
    half = bias.dtype.element_ty
    if i < d:
        tl.store(bias + i, (total + tl.load(b1 + i).to(tl.float32)).to(half))
    if i < d2:
        tl.store(bias + d + i, tl.load(b2 + i).to(half))
    if i < d4:
        tl.store(bias + d + d2 + i, tl.load(b3 + i).to(half))


@triton.jit
def _copy(source: tl.tensor, target: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr):
    """`width` numbers, cast to the target's dtype, by all programs together."""
    start = tl.program_id(0) * BLOCK
    while start < width:
        cols = start + tl.arange(0, BLOCK)
        value = tl.load(source + cols, mask=cols < width)
        tl.store(target + cols, value.to(target.dtype.element_ty), mask=cols < width)
        start += tl.num_programs(0) * BLOCK


@triton.jit
def _last_layer(gap: tl.tensor, w4: tl.tensor, b4: tl.tensor, d4: tl.tensor, BLOCK: tl.constexpr):
    """Gradients of w4 (2, d4) and b4 (2) from those of their second row less the first."""
    start = 0
    while start < d4:
        cols = start + tl.arange(0, BLOCK)
        value = tl.load(gap + cols, mask=cols < d4).to(w4.dtype.element_ty)
        tl.store(w4 + cols, -value, mask=cols < d4)
        tl.store(w4 + d4 + cols, value, mask=cols < d4)
        start += BLOCK
    value = tl.load(gap + d4).to(b4.dtype.element_ty)
    tl.store(b4, -value)
    tl.store(b4 + 1, value)


@jit()
def _unfold_kernel(
    totals: tl.tensor, gain: tl.tensor, shift: tl.tensor, w1: tl.tensor,
    grad_gain: tl.tensor, grad_shift: tl.tensor, grad_w1: tl.tensor, grad_b1: tl.tensor,
    grad_w2: tl.tensor, grad_b2: tl.tensor, grad_w3: tl.tensor, grad_b3: tl.tensor,
    grad_w4: tl.tensor, grad_b4: tl.tensor, d: tl.tensor, d2: tl.tensor, d4: tl.tensor,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the params from the totals of `_sum_kernel`."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    biases = totals + (d * d + d2 * d + d4 * d2)
    gain_here = tl.load(gain + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    shift_here = tl.load(shift + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    for_gain = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for_shift = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    start = 0
    while start < d:
        rows = start + tl.arange(0, BLOCK_R)
        inside = (rows < d)[:, None] & (cols < d)[None, :]
        at = rows[:, None] * d + cols[None, :]
        value = tl.load(totals + at, mask=inside, other=0.0)
        bias = tl.load(biases + rows, mask=rows < d, other=0.0)[:, None]
        w = tl.load(w1 + at, mask=inside, other=0.0).to(tl.float32)
        for_gain += w * value
        for_shift += w * bias
        value = value * gain_here + bias * shift_here
        tl.store(grad_w1 + at, value.to(grad_w1.dtype.element_ty), mask=inside)
        start += BLOCK_R
    value = tl.sum(for_gain, 0).to(grad_gain.dtype.element_ty)
    tl.store(grad_gain + cols, value, mask=cols < d)
    value = tl.sum(for_shift, 0).to(grad_shift.dtype.element_ty)
    tl.store(grad_shift + cols, value, mask=cols < d)
    _copy(totals + d * d, grad_w2, d2 * d, BLOCK)
    _copy(totals + (d * d + d2 * d), grad_w3, d4 * d2, BLOCK)
    _copy(biases, grad_b1, d, BLOCK)
    _copy(biases + d, grad_b2, d2, BLOCK)
    _copy(biases + (d + d2), grad_b3, d4, BLOCK)
    if tl.program_id(0) == 0:
        _last_layer(biases + (d + d2 + d4), grad_w4, grad_b4, d4, BLOCK)


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
def _slope(x: tl.tensor):
    """Derivative of GELU: below 0 the density times a polynomial fitted over 0..8, to 2.6e-5."""
    a = tl.abs(x)
    ratio = 0.03669629830691308 + a * (-0.006986209374951857 + a * 0.0005696098225845768)
    ratio = 0.24247440749001173 + a * (-0.11325675625633891 + a * ratio)
    ratio = 0.49997435964512144 + a * (-0.7967962677764447 + a * ratio)
    below = tl.exp2(a * a * -0.7213475204444817) * ratio
    return tl.where(x > 0, 1.0 - below, below)


@triton.jit
def _vector(pointer: tl.tensor, index: tl.tensor, end: tl.tensor):
    return tl.load(pointer + index, mask=index < end, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile(pointer: tl.tensor, row: tl.tensor, cols: tl.tensor, rows: tl.tensor, width: tl.tensor):
    """Rows and columns of a (rows, width) tensor, zero beyond its sides."""
    inside = (row < rows)[:, None] & (cols < width)[None, :]
    return tl.load(pointer + (row[:, None] * width + cols[None, :]), mask=inside, other=0.0)


@triton.jit
def _put(
    pointer: tl.tensor,
    row: tl.tensor,
    cols: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    value: tl.tensor,
):
    """Store value at the given rows and columns of a (rows, width) tensor."""
    inside = (row < rows)[:, None] & (cols < width)[None, :]
    at = pointer + (row[:, None] * width + cols[None, :])
    tl.store(at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _stats(stats: tl.tensor, row: tl.tensor, rows: tl.tensor):
    """1 / deviation of each token and minus its mean over its deviation (rows, 1)."""
    mean = tl.load(stats + 2 * row, mask=row < rows, other=0.0)
    rstd = tl.load(stats + 2 * row + 1, mask=row < rows, other=0.0)
    return rstd[:, None], (-mean * rstd)[:, None]


@triton.jit
def _put_stats(stats: tl.tensor, row: tl.tensor, rows: tl.tensor, mean: tl.tensor, rstd: tl.tensor):
    """Mean and 1 / deviation of each token, side by side."""
    tl.store(stats + 2 * row, mean, mask=row < rows)
    tl.store(stats + 2 * row + 1, rstd, mask=row < rows)


@triton.jit
def _head(h3: tl.tensor, w4: tl.tensor, b4: tl.tensor, j4: tl.tensor, d4: tl.tensor):
    """Second logit less the first, and the row of the last layer that gives it."""
    w4_gap = _vector(w4 + d4, j4, d4) - _vector(w4, j4, d4)
    return tl.sum(h3 * w4_gap, 1) + (tl.load(b4 + 1) - tl.load(b4)).to(tl.float32), w4_gap


@triton.jit
def _score(z: tl.tensor):
    """-softplus(z)"""
    return -(tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))))


@triton.jit
def _head_grad(
    grad: tl.tensor, p3: tl.tensor, w4: tl.tensor, b4: tl.tensor, row: tl.tensor, rows: tl.tensor,
    j4: tl.tensor, d4: tl.tensor,
):  # fmt: skip
    """Gradient before the last GELU; sums over the tile's tokens for w4 (D4) and b4."""
    pre = _tile(p3, row, j4, rows, d4).to(tl.float32)
    act = _gelu(pre)
    z, w4_gap = _head(act, w4, b4, j4, d4)
    gz = -tl.load(grad + row, mask=row < rows, other=0.0) / (1.0 + tl.exp(-z))
    return gz[:, None] * w4_gap * _slope(pre), tl.sum(gz[:, None] * act, 0), tl.sum(gz, 0)


@triton.jit
def _put_head_sums(partial: tl.tensor, j4: tl.tensor, d4: tl.tensor, w4: tl.tensor, b4: tl.tensor):
    """This program's sums of `_head_grad`: a column of `partial` (d4 + 1, programs)."""
    at = partial + tl.program_id(0)
    tl.store(at + j4 * tl.num_programs(0), w4, mask=j4 < d4)
    tl.store(at + d4 * tl.num_programs(0), b4)
