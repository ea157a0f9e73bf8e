"""Triton kernels of `dwconv_silu`: a block of columns and channels walks down an image's rows.

Every row is read once and added to the three rows it touches; two more rows are always on their
way. Values that a loop passes on start from reads of their own, never from one shared constant:
Triton takes two names of one value for a value that does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadmamba.kernels.fused.jit import Kernel, jit
from quadmamba.kernels.fused.launch import SIZES, ceil_div, device_of

BLOCK_W = 8  # columns of a block
ROWS, ADJOINT_ROWS = 28, 28  # most rows of a block
WARPS, GRAD_WARPS, ADJOINT_WARPS = 2, 2, 2


@triton.jit
def _place(
    h: tl.tensor,
    w: tl.tensor,
    d: tl.tensor,
    rows: tl.tensor,
    blocks_y: tl.tensor,
    blocks_x: tl.tensor,
    blocks_d: tl.tensor,
    BLOCK_W: tl.tensor,
    BLOCK_D: tl.tensor,
):
    """This block's image, rows, columns and channels; channels vary fastest."""
    pid = tl.program_id(0)
    chans = ((pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    pid = pid // blocks_d
    cols = ((pid % blocks_x) * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
    pid = pid // blocks_x
    first = (pid % blocks_y) * rows
    base = (pid // blocks_y).to(tl.int64) * h * w * d
    return base, first, tl.minimum(first + rows, h), cols, chans


@triton.jit
def _row(
    image: tl.tensor,
    y: tl.tensor,
    cols: tl.tensor,
    chans: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    w: tl.tensor,
    d: tl.tensor,
):
    """Row y at the given columns and channels, zero outside rows first..end and the grid."""
    inside = (cols >= 0) & (cols < w) & (chans < d) & (y >= first) & (y < end)
    return tl.load(image + y.to(tl.int64) * w * d + (cols * d + chans), mask=inside, other=0.0)


@triton.jit
def _taps(
    image: tl.tensor,
    y: tl.tensor,
    cols: tl.tensor,
    chans: tl.tensor,
    h: tl.tensor,
    w: tl.tensor,
    d: tl.tensor,
):
    """Row y, one column to the left, straight, and one to the right."""
    left = _row(image, y, cols - 1, chans, 0, h, w, d)
    straight = _row(image, y, cols, chans, 0, h, w, d)
    return left, straight, _row(image, y, cols + 1, chans, 0, h, w, d)


@triton.jit
def _put_row(
    out: tl.tensor,
    y: tl.tensor,
    cols: tl.tensor,
    chans: tl.tensor,
    first: tl.tensor,
    w: tl.tensor,
    d: tl.tensor,
    value: tl.tensor,
):
    """Store row y unless it lies above row `first`."""
    mask = (cols < w) & (chans < d) & (y >= first)
    at = out + y.to(tl.int64) * w * d + (cols * d + chans)
    tl.store(at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _filter_row(
    weight: tl.tensor, i: tl.tensor, chans: tl.tensor, d: tl.tensor, FLIP: tl.constexpr
):
    """Row i of the filters, each (1, channels) float32; with FLIP of the adjoint's filters."""
    first = weight + chans * 9 + (8 - 3 * i if FLIP else 3 * i)
    step = -1 if FLIP else 1
    a = tl.load(first, mask=chans < d, other=0.0).to(tl.float32)
    b = tl.load(first + step, mask=chans < d, other=0.0).to(tl.float32)
    return a, b, tl.load(first + 2 * step, mask=chans < d, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(x: tl.tensor):
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # cheaper than a division
    return root * root


@jit(do_not_specialize=["h", "w", "rows", "blocks_y", "blocks_x", "blocks_d"])
def _conv_kernel(
    x: tl.tensor, weight: tl.tensor, grad: tl.tensor, out: tl.tensor, h: tl.tensor, w: tl.tensor,
    d: tl.tensor, rows: tl.tensor, blocks_y: tl.tensor, blocks_x: tl.tensor, blocks_d: tl.tensor,
    GRAD: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """silu(convolution of x), or with GRAD the gradient of the convolution, given that of silu."""
    base, y0, end, cols, chans = _place(
        h, w, d, rows, blocks_y, blocks_x, blocks_d, BLOCK_W, BLOCK_D
    )
    x, grad, out = x + base, grad + base, out + base
    a0, a1, a2 = _filter_row(weight, 0, chans, d, False)
    b0, b1, b2 = _filter_row(weight, 1, chans, d, False)
    c0, c1, c2 = _filter_row(weight, 2, chans, d, False)
    above = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)  # sum of the row above the one just read
    here = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
    y = y0 - 1  # the row added; the one above it is complete then
    l0, m0, r0 = _taps(x, y, cols, chans, h, w, d)
    l1, m1, r1 = _taps(x, y + 1, cols, chans, h, w, d)
    g = _row(grad, y - 1, cols, chans, y0, end, w, d)  # zero
    while y <= end:
        l2, m2, r2 = _taps(x, y + 2, cols, chans, h, w, d)
        l, m, r = l0.to(tl.float32), m0.to(tl.float32), r0.to(tl.float32)
        value = above + l * c0 + m * c1 + r * c2
        above = here + l * b0 + m * b1 + r * b2
        here = l * a0 + m * a1 + r * a2
        gate = _sigmoid(value)
        if GRAD:
            value = g.to(tl.float32) * gate * (1.0 + value * (1.0 - gate))
            g = _row(grad, y, cols, chans, y0, end, w, d)
        else:
            value = value * gate
        _put_row(out, y - 1, cols, chans, y0, w, d, value)
        l0, m0, r0, l1, m1, r1 = l1, m1, r1, l2, m2, r2
        y += 1


@jit(do_not_specialize=["h", "w", "rows", "blocks_y", "blocks_x", "blocks_d"])
def _adjoint_kernel(
    grad: tl.tensor, weight: tl.tensor, x: tl.tensor, grad_x: tl.tensor, partial: tl.tensor,
    h: tl.tensor, w: tl.tensor, d: tl.tensor, rows: tl.tensor, blocks_y: tl.tensor,
    blocks_x: tl.tensor, blocks_d: tl.tensor,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and this block's share of the filters' gradient (d, 9).

    A row of the convolution's gradient meets the rows of x above it, beside it and below it.
    """
    base, y0, end, cols, chans = _place(
        h, w, d, rows, blocks_y, blocks_x, blocks_d, BLOCK_W, BLOCK_D
    )
    grad, x, grad_x = grad + base, x + base, grad_x + base
    a0, a1, a2 = _filter_row(weight, 0, chans, d, True)
    b0, b1, b2 = _filter_row(weight, 1, chans, d, True)
    c0, c1, c2 = _filter_row(weight, 2, chans, d, True)
    zero = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
    above, here = zero, zero
    da0, da1, da2, db0, db1, db2, dc0, dc1, dc2 = (zero,) * 9
    y = y0 - 1
    l0, m0, r0 = _taps(grad, y, cols, chans, h, w, d)
    l1, m1, r1 = _taps(grad, y + 1, cols, chans, h, w, d)
    x_above = _row(x, y - 1, cols, chans, y0, end, w, d)  # zero
    x_here = _row(x, y, cols, chans, y0, end, w, d)  # zero
    x_below = _row(x, y + 1, cols, chans, y0, end, w, d)
    while y <= end:
        l2, m2, r2 = _taps(grad, y + 2, cols, chans, h, w, d)
        x_next = _row(x, y + 2, cols, chans, y0, end, w, d)
        l, m, r = l0.to(tl.float32), m0.to(tl.float32), r0.to(tl.float32)
        value = above + l * c0 + m * c1 + r * c2
        above = here + l * b0 + m * b1 + r * b2
        here = l * a0 + m * a1 + r * a2
        da0, da1, da2 = da0 + r * x_above, da1 + m * x_above, da2 + l * x_above
        db0, db1, db2 = db0 + r * x_here, db1 + m * x_here, db2 + l * x_here
        dc0, dc1, dc2 = dc0 + r * x_below, dc1 + m * x_below, dc2 + l * x_below
        _put_row(grad_x, y - 1, cols, chans, y0, w, d, value)
        l0, m0, r0, l1, m1, r1 = l1, m1, r1, l2, m2, r2
        x_above, x_here, x_below = x_here, x_below, x_next
        y += 1
    part = partial + (tl.program_id(0) // blocks_d).to(tl.int64) * 9 * d + chans * 9
    sums = (da0, da1, da2, db0, db1, db2, dc0, dc1, dc2)
    for k in tl.static_range(9):
        tl.store(part + k, tl.sum(sums[k], 0)[None, :], mask=chans < d)


class _Launch(NamedTuple):
    """A kernel for one size, as a function of its tensors. parts: shares of the sum it leaves."""

    kernel: Callable[..., None]
    grid: tuple[int]
    parts: int


def _fix(
    kernel: Kernel, shape: tuple[int, int, int, int], most_rows: int, **options: int
) -> _Launch:
    """For grids (b, h, w, d)."""
    b, h, w, d = shape
    block_d = 64 if d % 64 == 0 else 32
    rows = ceil_div(h, ceil_div(h, most_rows))
    blocks = ceil_div(h, rows), ceil_div(w, BLOCK_W), ceil_div(d, block_d)
    sizes = {"h": h, "w": w, "d": d, "rows": rows}
    sizes |= {f"blocks_{axis}": count for axis, count in zip("yxd", blocks)}
    parts = b * blocks[0] * blocks[1]
    fixed = kernel.fixed(**sizes, BLOCK_W=BLOCK_W, BLOCK_D=block_d, **options)
    return _Launch(fixed, (parts * blocks[2],), parts)


@lru_cache(SIZES)
def _launches(*shape: int) -> tuple[_Launch, _Launch, _Launch]:
    """Forward, gradient of the convolution, its adjoint."""
    return (
        _fix(_conv_kernel, shape, ROWS, GRAD=False, num_warps=WARPS),
        _fix(_conv_kernel, shape, ROWS, GRAD=True, num_warps=GRAD_WARPS),
        _fix(_adjoint_kernel, shape, ADJOINT_ROWS, num_warps=ADJOINT_WARPS),
    )


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """silu(convolution), (b, h, w, d) to (b, h, w, d), x and weight contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        kernel, grid, _ = _launches(*x.shape)[0]
        with device_of(x):
            kernel(grid, x, weight, x, out)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; all contiguous. Partial sums add up in a fixed order."""
    grad_x, inner = torch.empty_like(x), torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    _, convolve, adjoint = _launches(*x.shape)
    partial = x.new_empty((adjoint.parts, x.shape[3], 9), dtype=torch.float32)
    with device_of(x):
        convolve.kernel(convolve.grid, x, weight, grad, inner)
        adjoint.kernel(adjoint.grid, inner, weight, x, grad_x, partial)
    return grad_x, partial.sum(0).view(weight.shape).to(weight.dtype)
