"""Triton kernels of `dwconv_silu`: a warp has a few columns of some channels and walks down rows.

A row that is read adds to the three rows of the convolution that it touches, and further rows are
on their way. The backward pass does both steps of its chain in one walk: a row of x completes the
row of the convolution above it, whose gradient completes the row of x above that one. Neighbours
compute the columns that both need, so nothing passes between warps.

The number of channels is a constant of a kernel: columns then lie at fixed distances from one
pointer. With a pointer for each, the registers of the backward pass would hold few else.
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

COLUMNS, CHANNELS = 4, 2  # of a thread
ROWS = 28  # most rows of a block


@triton.jit
def _place(
    h: tl.tensor, rows: tl.tensor, blocks_y: tl.tensor, blocks_x: tl.tensor, blocks_d: tl.tensor,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This block's image, first row and the end of its rows, first column, and channels.

    Channels vary fastest.
    """
    pid = tl.program_id(0)
    chans = (pid % blocks_d) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // blocks_d
    col = (pid % blocks_x) * COLUMNS
    pid = pid // blocks_x
    first = (pid % blocks_y) * rows
    return (pid // blocks_y).to(tl.int64), first, tl.minimum(first + rows, h), col, chans


@triton.jit
def _ends(rows: tl.tensor, col: tl.tensor, w: tl.tensor, COUNT: tl.constexpr):
    """How many rows each of COUNT columns has: none outside the grid."""
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (tl.where((col + j >= 0) & (col + j < w), rows, 0),)
    return found


@triton.jit
def _row(
    at: tl.tensor, y: tl.tensor, ends: tl.tensor, live: tl.tensor, d: tl.constexpr,
    COUNT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Row y of COUNT columns, zero outside rows 0..ends; `at`: where its first column lies.

    live: the channels that exist, which are all with EVEN.
    """
    found = ()
    for j in tl.static_range(COUNT):
        inside = (y >= 0) & (y < ends[j])
        if EVEN:
            value = tl.load(at + j * d, mask=inside, other=0.0)
        else:
            value = tl.load(at + j * d, mask=live & inside, other=0.0)
        found = found + (value,)
    return found


@triton.jit
def _put_row(
    at: tl.tensor, values: tl.tensor, col: tl.tensor, w: tl.tensor, on: tl.tensor,
    live: tl.tensor, d: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store a row where `on` is set; the other arguments are as in `_row`."""
    for j in tl.static_range(COUNT):
        value, inside = values[j].to(at.dtype.element_ty), on & (col + j < w)
        if EVEN:
            tl.store(at + j * d, value, mask=inside)
        else:
            tl.store(at + j * d, value, mask=live & inside)


@triton.jit
def _filter_row(weight: tl.tensor, i: tl.tensor, chans: tl.tensor, live: tl.tensor):
    """Row i of the filters, each (channels) float32."""
    first = weight + chans * 9 + 3 * i
    a = tl.load(first, mask=live, other=0.0).to(tl.float32)
    b = tl.load(first + 1, mask=live, other=0.0).to(tl.float32)
    return a, b, tl.load(first + 2, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _widen(values: tl.tensor, COUNT: tl.constexpr):
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (values[j].to(tl.float32),)
    return found


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((BLOCK,), tl.float32),)
    return found


@triton.jit
def _meet(row: tl.tensor, filters: tl.tensor, COUNT: tl.constexpr):
    """What COUNT columns get from a row that begins one column before them."""
    a, b, c = filters
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (row[j] * a + row[j + 1] * b + row[j + 2] * c,)
    return found


@triton.jit
def _add_meet(sums: tl.tensor, row: tl.tensor, filters: tl.tensor, COUNT: tl.constexpr):
    """sums and `_meet`, added term by term."""
    a, b, c = filters
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (sums[j] + row[j] * a + row[j + 1] * b + row[j + 2] * c,)
    return found


@triton.jit
def _sigmoid(x: tl.tensor):
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # cheaper than a division
    return root * root


@jit(do_not_specialize=["h", "w", "rows", "blocks_y", "blocks_x", "blocks_d"])
def _dwconv_kernel(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, h: tl.tensor, w: tl.tensor, rows: tl.tensor,
    blocks_y: tl.tensor, blocks_x: tl.tensor, blocks_d: tl.tensor,
    d: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = COLUMNS + 2
    image, y0, end, col, chans = _place(h, rows, blocks_y, blocks_x, blocks_d, COLUMNS, BLOCK)
    live = chans < d
    top = _filter_row(weight, 0, chans, live)
    middle = _filter_row(weight, 1, chans, live)
    bottom = _filter_row(weight, 2, chans, live)
    above = _zeros(COLUMNS, BLOCK)  # sums of the row above the one just read
    here = _zeros(COLUMNS, BLOCK)
    start = tl.maximum(y0 - 1, 0)
    first, ends = (image * h + start) * w + col, _ends(h, col - 1, w, WIDE)
    x, out = x + (first - 1) * d + chans, out + (first - w) * d + chans
    now = _row(x, start, ends, live, d, WIDE, EVEN)
    ahead = _row(x + w * d, start + 1, ends, live, d, WIDE, EVEN)
    x += 2 * w * d
    for y in tl.range(start, end + 1):  # the row added; the one above it is complete then
        later = _row(x, y + 2, ends, live, d, WIDE, EVEN)
        row = _widen(now, WIDE)
        done = _add_meet(above, row, bottom, COLUMNS)
        above = _add_meet(here, row, middle, COLUMNS)
        here = _meet(row, top, COLUMNS)
        values = ()
        for j in tl.static_range(COLUMNS):
            values = values + (done[j] * _sigmoid(done[j]),)
        _put_row(out, values, col, w, y > y0, live, d, COLUMNS, EVEN)
        now, ahead = ahead, later
        x, out = x + w * d, out + w * d


@triton.jit
def _add_products(
    sums: tl.tensor, inner: tl.tensor, own: tl.tensor, before: tl.tensor, last: tl.tensor,
    now: tl.tensor, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums (9) plus the products of this warp's columns of inner with the x around them.

    own: whether the row counts here. inner and the rows of x begin one column before.
    """
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


@jit(do_not_specialize=["h", "w", "rows", "blocks_y", "blocks_x", "blocks_d"])
def _dwconv_grad_kernel(
    grad: tl.tensor, x: tl.tensor, weight: tl.tensor, grad_x: tl.tensor, partial: tl.tensor,
    h: tl.tensor, w: tl.tensor, rows: tl.tensor, blocks_y: tl.tensor, blocks_x: tl.tensor,
    blocks_d: tl.tensor,
    d: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and this block's share of the filters' gradient (d, 9).

    inner, the gradient of the convolution, has a row and a column more on each side than the
    gradient of x, and x has two.
    """
    INNER: tl.constexpr = COLUMNS + 2
    OUTER: tl.constexpr = COLUMNS + 4
    image, y0, end, col, chans = _place(h, rows, blocks_y, blocks_x, blocks_d, COLUMNS, BLOCK)
    live = chans < d
    a0, a1, a2 = _filter_row(weight, 0, chans, live)
    b0, b1, b2 = _filter_row(weight, 1, chans, live)
    c0, c1, c2 = _filter_row(weight, 2, chans, live)
    sums = _zeros(9, BLOCK)  # of the filters' gradient
    above = _zeros(INNER, BLOCK)  # of the convolution, as in the forward pass
    here = _zeros(INNER, BLOCK)
    upper = _zeros(COLUMNS, BLOCK)  # the same of the gradient of x, one row further up
    lower = _zeros(COLUMNS, BLOCK)
    start, top = tl.maximum(y0 - 2, 0), tl.maximum(y0 - 1, 0)  # first row of x, of inner
    first = (image * h + start) * w + col
    ends = _ends(h, col - 2, w, OUTER)
    inner_ends = _ends(tl.minimum(end + 1, h) - top, col - 1, w, INNER)
    x, grad = x + (first - 2) * d + chans, grad + (first - w - 1) * d + chans
    grad_x += (first - 2 * w) * d + chans
    now = _row(x, start, ends, live, d, OUTER, EVEN)
    last = _row(x, h, ends, live, d, INNER, EVEN)  # zeros, as no inner row meets them
    before = _row(x, h + 1, ends, live, d, INNER, EVEN)
    g = _row(grad, start - 1 - top, inner_ends, live, d, INNER, EVEN)
    for y in tl.range(start, end + 2):  # the row of x that is added
        x, grad = x + w * d, grad + w * d
        ahead = _row(x, y + 1, ends, live, d, OUTER, EVEN)
        next_g = _row(grad, y - top, inner_ends, live, d, INNER, EVEN)
        row = _widen(now, OUTER)
        done = _add_meet(above, row, (c0, c1, c2), INNER)
        above = _add_meet(here, row, (b0, b1, b2), INNER)
        here = _meet(row, (a0, a1, a2), INNER)
        inner = ()
        for j in tl.static_range(INNER):
            gate = _sigmoid(done[j])
            slope = gate * (1.0 + done[j] * (1.0 - gate))
            inner = inner + (g[j].to(tl.float32) * slope,)
        values = _add_meet(upper, inner, (a2, a1, a0), COLUMNS)
        upper = _add_meet(lower, inner, (b2, b1, b0), COLUMNS)
        lower = _meet(inner, (c2, c1, c0), COLUMNS)
        _put_row(grad_x, values, col, w, y > y0 + 1, live, d, COLUMNS, EVEN)
        grad_x += w * d
        middle = ()
        for j in tl.static_range(INNER):
            middle = middle + (now[j + 1],)
        own = (y > y0) & (y <= end)
        sums = _add_products(sums, inner, own, before, last, middle, COLUMNS)
        before, last, now, g = last, middle, ahead, next_g
    part = partial + (tl.program_id(0) // blocks_d).to(tl.int64) * 9 * d + chans * 9
    for k in tl.static_range(9):
        tl.store(part + k, sums[k], mask=live)


class _Launch(NamedTuple):
    """A kernel for one size, as a function of its tensors. parts: shares of the sum it leaves."""

    kernel: Callable[..., None]
    grid: tuple[int]
    parts: int


def _fix(kernel: Kernel, shape: tuple[int, int, int, int]) -> _Launch:
    """For grids (b, h, w, d)."""
    b, h, w, d = shape
    rows, block = ceil_div(h, ceil_div(h, ROWS)), 32 * CHANNELS
    blocks = ceil_div(h, rows), ceil_div(w, COLUMNS), ceil_div(d, block)
    sizes = {"h": h, "w": w, "rows": rows}
    sizes |= {f"blocks_{axis}": count for axis, count in zip("yxd", blocks)}
    sides = {"d": d, "COLUMNS": COLUMNS, "BLOCK": block, "EVEN": d % block == 0}
    parts = b * blocks[0] * blocks[1]
    return _Launch(kernel.fixed(**sizes, **sides, num_warps=1), (parts * blocks[2],), parts)


@lru_cache(SIZES)
def _launches(*shape: int) -> tuple[_Launch, _Launch]:
    """Forward and backward."""
    return _fix(_dwconv_kernel, shape), _fix(_dwconv_grad_kernel, shape)


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
