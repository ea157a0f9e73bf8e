"""Triton kernels of `dwconv_silu`: threads with a few columns each walk down an image's rows.

A row that is read adds to the three rows of the convolution that it touches, and two more rows are
always on their way. The backward pass does both steps of its chain in one walk: a row of x
completes the row of the convolution above it, whose gradient completes the row of x above that one.
Neighbouring threads compute the columns that both need, so nothing passes between them.

Values that a loop passes on start from reads of their own, never from one shared constant: Triton
takes two names of one value for a value that does not change.
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
from quadmamba.kernels.fused.launch import SIZES, ceil_div, device_of, power_of_2

COLUMNS = 4  # of a thread
BLOCK_G, BLOCK_D = 4, 64  # most groups of columns, and channels, of a block
CHANNELS = 2  # of a thread
ROWS, GRAD_ROWS = 28, 28  # most rows of a block
UNROLL = 2


@triton.jit
def _place(
    h: tl.tensor, w: tl.tensor, d: tl.tensor, rows: tl.tensor, blocks_y: tl.tensor,
    blocks_x: tl.tensor, blocks_d: tl.tensor,
    COLUMNS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This block's image, rows, first column of each group, and channels, which vary fastest."""
    pid = tl.program_id(0)
    chans = ((pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    pid = pid // blocks_d
    cols = (((pid % blocks_x) * BLOCK_G + tl.arange(0, BLOCK_G)) * COLUMNS)[:, None]
    pid = pid // blocks_x
    first = (pid % blocks_y) * rows
    base = (pid // blocks_y).to(tl.int64) * h * w * d
    return base, first, tl.minimum(first + rows, h), cols, chans


@triton.jit
def _row(
    image: tl.tensor, y: tl.tensor, cols: tl.tensor, chans: tl.tensor, first: tl.tensor,
    end: tl.tensor, w: tl.tensor, d: tl.tensor, COUNT: tl.constexpr,
):  # fmt: skip
    """Row y at COUNT columns from `cols` on, zero outside rows first..end and the grid."""
    image += y.to(tl.int64) * w * d
    found = ()
    for j in tl.static_range(COUNT):
        col = cols + j
        inside = (col >= 0) & (col < w) & (chans < d) & (y >= first) & (y < end)
        found = found + (tl.load(image + (col * d + chans), mask=inside, other=0.0),)
    return found


@triton.jit
def _put_row(
    out: tl.tensor, y: tl.tensor, cols: tl.tensor, chans: tl.tensor, first: tl.tensor,
    w: tl.tensor, d: tl.tensor, values: tl.tensor, COUNT: tl.constexpr,
):  # fmt: skip
    """Store row y unless it lies above row `first`."""
    out += y.to(tl.int64) * w * d
    for j in tl.static_range(COUNT):
        mask = (cols + j < w) & (chans < d) & (y >= first)
        at = out + ((cols + j) * d + chans)
        tl.store(at, values[j].to(out.dtype.element_ty), mask=mask)


@triton.jit
def _filter_row(weight: tl.tensor, i: tl.tensor, chans: tl.tensor, d: tl.tensor):
    """Row i of the filters, each (1, channels) float32."""
    first = weight + chans * 9 + 3 * i
    a = tl.load(first, mask=chans < d, other=0.0).to(tl.float32)
    b = tl.load(first + 1, mask=chans < d, other=0.0).to(tl.float32)
    return a, b, tl.load(first + 2, mask=chans < d, other=0.0).to(tl.float32)


@triton.jit
def _widen(values: tl.tensor, COUNT: tl.constexpr):
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (values[j].to(tl.float32),)
    return found


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((BLOCK_G, BLOCK_D), tl.float32),)
    return found


@triton.jit
def _meet(sums: tl.tensor, row: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor,
          COUNT: tl.constexpr):  # fmt: skip
    """sums plus what COUNT columns get from a row that begins one column before them."""
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (sums[j] + row[j] * a + row[j + 1] * b + row[j + 2] * c,)
    return found


@triton.jit
def _begin(row: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, COUNT: tl.constexpr):
    """`_meet` of zeros."""
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (row[j] * a + row[j + 1] * b + row[j + 2] * c,)
    return found


@triton.jit
def _sigmoid(x: tl.tensor):
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # cheaper than a division
    return root * root


@jit(do_not_specialize=["h", "w", "rows", "blocks_y", "blocks_x", "blocks_d"])
def _forward_kernel(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, h: tl.tensor, w: tl.tensor, d: tl.tensor,
    rows: tl.tensor, blocks_y: tl.tensor, blocks_x: tl.tensor, blocks_d: tl.tensor,
    COLUMNS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    base, y0, end, cols, chans = _place(
        h, w, d, rows, blocks_y, blocks_x, blocks_d, COLUMNS, BLOCK_G, BLOCK_D
    )
    x, out = x + base, out + base
    a0, a1, a2 = _filter_row(weight, 0, chans, d)
    b0, b1, b2 = _filter_row(weight, 1, chans, d)
    c0, c1, c2 = _filter_row(weight, 2, chans, d)
    above = _zeros(COLUMNS, BLOCK_G, BLOCK_D)  # sums of the row above the one just read
    here = _zeros(COLUMNS, BLOCK_G, BLOCK_D)
    start = tl.maximum(y0 - 1, 0)
    now = _row(x, start, cols - 1, chans, 0, h, w, d, COLUMNS + 2)
    ahead = _row(x, start + 1, cols - 1, chans, 0, h, w, d, COLUMNS + 2)
    for y in tl.range(start, end + 1, loop_unroll_factor=UNROLL):  # the row added
        later = _row(x, y + 2, cols - 1, chans, 0, h, w, d, COLUMNS + 2)
        row = _widen(now, COLUMNS + 2)
        done = _meet(above, row, c0, c1, c2, COLUMNS)
        above = _meet(here, row, b0, b1, b2, COLUMNS)
        here = _begin(row, a0, a1, a2, COLUMNS)
        values = ()
        for j in tl.static_range(COLUMNS):
            values = values + (done[j] * _sigmoid(done[j]),)
        _put_row(out, y - 1, cols, chans, y0, w, d, values, COLUMNS)
        now, ahead = ahead, later


@jit(do_not_specialize=["h", "w", "rows", "blocks_y", "blocks_x", "blocks_d"])
def _backward_kernel(
    grad: tl.tensor, x: tl.tensor, weight: tl.tensor, grad_x: tl.tensor, partial: tl.tensor,
    h: tl.tensor, w: tl.tensor, d: tl.tensor, rows: tl.tensor, blocks_y: tl.tensor,
    blocks_x: tl.tensor, blocks_d: tl.tensor,
    COLUMNS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and this block's share of the filters' gradient (d, 9).

    inner, the gradient of the convolution, covers one column and one row more on each side than
    the gradient of x, and x two.
    """
    INNER: tl.constexpr = COLUMNS + 2
    base, y0, end, cols, chans = _place(
        h, w, d, rows, blocks_y, blocks_x, blocks_d, COLUMNS, BLOCK_G, BLOCK_D
    )
    grad, x, grad_x = grad + base, x + base, grad_x + base
    a0, a1, a2 = _filter_row(weight, 0, chans, d)
    b0, b1, b2 = _filter_row(weight, 1, chans, d)
    c0, c1, c2 = _filter_row(weight, 2, chans, d)
    sums = _zeros(9, BLOCK_G, BLOCK_D)  # of the filters' gradient
    above = _zeros(INNER, BLOCK_G, BLOCK_D)  # of the convolution, as in the forward pass
    here = _zeros(INNER, BLOCK_G, BLOCK_D)
    upper = _zeros(COLUMNS, BLOCK_G, BLOCK_D)  # of the gradient of x, one row further up
    lower = _zeros(COLUMNS, BLOCK_G, BLOCK_D)
    first, stop = tl.maximum(y0 - 1, 0), tl.minimum(end + 1, h)  # rows of inner
    start = tl.maximum(y0 - 2, 0)
    now = _row(x, start, cols - 2, chans, 0, h, w, d, COLUMNS + 4)
    last = _row(x, start - 1, cols - 1, chans, end, end, w, d, INNER)  # zero, as no inner meets it
    before = _row(x, start - 2, cols - 1, chans, end, end, w, d, INNER)
    g = _row(grad, start - 1, cols - 1, chans, first, stop, w, d, INNER)
    for y in tl.range(start, end + 2, loop_unroll_factor=UNROLL):
        ahead = _row(x, y + 1, cols - 2, chans, 0, h, w, d, COLUMNS + 4)
        next_g = _row(grad, y, cols - 1, chans, first, stop, w, d, INNER)
        row = _widen(now, COLUMNS + 4)
        done = _meet(above, row, c0, c1, c2, INNER)
        above = _meet(here, row, b0, b1, b2, INNER)
        here = _begin(row, a0, a1, a2, INNER)
        inner = ()
        for j in tl.static_range(INNER):
            gate = _sigmoid(done[j])
            slope = gate * (1.0 + done[j] * (1.0 - gate))
            inner = inner + (g[j].to(tl.float32) * slope,)
        values = _meet(upper, inner, a2, a1, a0, COLUMNS)
        upper = _meet(lower, inner, b2, b1, b0, COLUMNS)
        lower = _begin(inner, c2, c1, c0, COLUMNS)
        _put_row(grad_x, y - 2, cols, chans, y0, w, d, values, COLUMNS)
        middle = ()
        for j in tl.static_range(INNER):
            middle = middle + (now[j + 1],)
        own = (y > y0) & (y <= end)  # whether the row of inner is this block's
        sums = _add_products(sums, inner, own, before, last, middle, COLUMNS)
        before, last, now, g = last, middle, ahead, next_g
    part = partial + (tl.program_id(0) // blocks_d).to(tl.int64) * 9 * d + chans * 9
    for k in tl.static_range(9):
        tl.store(part + k, tl.sum(sums[k], 0)[None, :], mask=chans < d)


@triton.jit
def _add_products(
    sums: tl.tensor, inner: tl.tensor, own: tl.tensor, before: tl.tensor, last: tl.tensor,
    now: tl.tensor, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums (9) plus the products of the thread's columns of inner with the x around them."""
    mine = ()
    for j in tl.static_range(COLUMNS):
        mine = mine + (tl.where(own, inner[j + 1], 0.0),)
    found = ()
    for i in tl.static_range(3):
        row = before if i == 0 else (last if i == 1 else now)
        for k in tl.static_range(3):
            total = sums[3 * i + k]
            for j in tl.static_range(COLUMNS):
                total += mine[j] * row[j + k].to(tl.float32)
            found = found + (total,)
    return found


class _Launch(NamedTuple):
    """A kernel for one size, as a function of its tensors. parts: shares of the sum it leaves."""

    kernel: Callable[..., None]
    grid: tuple[int]
    parts: int


def _fix(kernel: Kernel, shape: tuple[int, int, int, int], most_rows: int) -> _Launch:
    """For grids (b, h, w, d)."""
    b, h, w, d = shape
    rows = ceil_div(h, ceil_div(h, most_rows))
    groups = ceil_div(w, COLUMNS)
    block_g, block_d = min(BLOCK_G, power_of_2(groups)), min(BLOCK_D, max(32, power_of_2(d)))
    blocks = ceil_div(h, rows), ceil_div(groups, block_g), ceil_div(d, block_d)
    sizes = {"h": h, "w": w, "d": d, "rows": rows}
    sizes |= {f"blocks_{axis}": count for axis, count in zip("yxd", blocks)}
    parts = b * blocks[0] * blocks[1]
    sides = {"COLUMNS": COLUMNS, "BLOCK_G": block_g, "BLOCK_D": block_d, "UNROLL": UNROLL}
    warps = max(1, block_g * block_d // (32 * CHANNELS))
    return _Launch(kernel.fixed(**sizes, **sides, num_warps=warps), (parts * blocks[2],), parts)


@lru_cache(SIZES)
def _launches(*shape: int) -> tuple[_Launch, _Launch]:
    """Forward and backward."""
    return _fix(_forward_kernel, shape, ROWS), _fix(_backward_kernel, shape, GRAD_ROWS)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """silu(convolution), (b, h, w, d) to (b, h, w, d), x and weight contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        kernel, grid, _ = _launches(*x.shape)[0]
        with device_of(x):
            kernel(grid, x, weight, out)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; all contiguous. Partial sums add up in a fixed order."""
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    kernel, grid, parts = _launches(*x.shape)[1]
    partial = x.new_empty((parts, x.shape[3], 9), dtype=torch.float32)
    with device_of(x):
        kernel(grid, grad, x, weight, grad_x, partial)
    return grad_x, partial.sum(0).view(weight.shape).to(weight.dtype)
