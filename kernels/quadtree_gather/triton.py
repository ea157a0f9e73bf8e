"""Triton kernels of the quadtree gather: rows are picked up from two places of the same image.

Way in, way out and both adjoints are one operation on rows r of an image,

    out[r] = w1(r) src[first[r]] + w2(r) src[second[r]]

Rows are tokens (way out; adjoint of the way in: first, second = fine, coarse) or positions of the
sequence (way in; adjoint of the way out: first, second = the inverses of fine and coarse).
A row with weight 0 is not read, so an image with a one-hot decision costs one read and one write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from quadmamba.kernels.fused.jit import jit
from quadmamba.kernels.fused.launch import SIZES, ceil_div, device_of

BLOCK_L, SUMS_BLOCK_L, BLOCK_D, WARPS = 16, 32, 64, 4


@jit(do_not_specialize=["l", "blocks"])
def _two_source_kernel(
    src: tl.tensor, other: tl.tensor, out: tl.tensor, partial: tl.tensor, decision: tl.tensor,
    first: tl.tensor, second: tl.tensor, quadrant: tl.tensor, l: tl.tensor, d: tl.tensor,
    blocks: tl.tensor,
    TOKENS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    image = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    real = rows < l
    i1 = tl.load(first + rows, mask=real, other=0)
    i2 = tl.load(second + rows, mask=real, other=0)
    q1 = tl.load(quadrant + (rows if TOKENS else i1), mask=real, other=0)
    q2 = tl.load(quadrant + (rows if TOKENS else i2), mask=real, other=0)
    w1 = tl.load(decision + image * 4 + q1, mask=real, other=0.0).to(tl.float32)
    w2 = 1.0 - tl.load(decision + image * 4 + q2, mask=real, other=1.0).to(tl.float32)
    base = image * l * d
    at = base + rows.to(tl.int64)[:, None] * d
    at1, at2 = base + i1.to(tl.int64)[:, None] * d, base + i2.to(tl.int64)[:, None] * d
    read1 = real if DOT else w1 != 0.0
    read2 = real if DOT else w2 != 0.0
    sum1 = tl.zeros((BLOCK_L,), tl.float32)
    sum2 = tl.zeros((BLOCK_L,), tl.float32)
    for chunk in range(CHUNKS):
        cols = (chunk * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        v1 = tl.load(src + at1 + cols, mask=read1[:, None] & (cols < d), other=0.0).to(tl.float32)
        v2 = tl.load(src + at2 + cols, mask=read2[:, None] & (cols < d), other=0.0).to(tl.float32)
        value = w1[:, None] * v1 + w2[:, None] * v2
        tl.store(out + at + cols, value.to(out.dtype.element_ty), mask=real[:, None] & (cols < d))
        if DOT:
            v = tl.load(other + at + cols, mask=real[:, None] & (cols < d), other=0.0)
            sum1 += tl.sum(v.to(tl.float32) * v1, 1)
            sum2 += tl.sum(v.to(tl.float32) * v2, 1)
    if DOT:
        for q in tl.static_range(4):
            total = tl.where(q1 == q, sum1, 0.0) - tl.where(q2 == q, sum2, 0.0)
            tl.store(partial + pid * 4 + q, tl.sum(total, 0))


@jit(do_not_specialize=["l", "blocks"])
def _decision_grad_kernel(
    tokens: tl.tuple, gathered: tl.tuple, partial: tl.tensor, choice: tl.tensor,
    tables: tl.tensor, fine: tl.tensor, coarse: tl.tensor, quadrant: tl.tensor,
    widths: tl.tuple, l: tl.tensor, blocks: tl.tensor,
    PAIRS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over a block of tokens, by quadrant, of all pairs (tokens, gathered) together."""
    pid = tl.program_id(0)
    image = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    real = rows < l
    order = tables + tl.load(choice + image) * l
    i1 = tl.load(order + tl.load(fine + rows, mask=real, other=0), mask=real, other=0)
    i2 = tl.load(order + tl.load(coarse + rows, mask=real, other=0), mask=real, other=0)
    quad = tl.load(quadrant + rows, mask=real, other=0)
    moved = (real & (i1 != i2))[:, None]  # elsewhere the two readings cancel
    dot = tl.zeros((BLOCK_L,), tl.float32)
    for pair in tl.static_range(PAIRS):
        d = widths[pair]
        base = image * l * d
        at = base + rows.to(tl.int64)[:, None] * d
        at1, at2 = base + i1.to(tl.int64)[:, None] * d, base + i2.to(tl.int64)[:, None] * d
        start = 0
        while start < d:
            cols = (start + tl.arange(0, BLOCK_D))[None, :]
            inside = moved & (cols < d)
            v = tl.load(tokens[pair] + at + cols, mask=inside, other=0.0).to(tl.float32)
            v1 = tl.load(gathered[pair] + at1 + cols, mask=inside, other=0.0).to(tl.float32)
            v2 = tl.load(gathered[pair] + at2 + cols, mask=inside, other=0.0).to(tl.float32)
            dot += tl.sum(v * (v1 - v2), 1)
            start += BLOCK_D
    for q in tl.static_range(4):
        tl.store(partial + pid * 4 + q, tl.sum(tl.where(quad == q, dot, 0.0), 0))


@lru_cache(SIZES)
def _launch(
    b: int, l: int, d: int, tokens: bool, dot: bool
) -> tuple[Callable[..., None], tuple[int]]:
    """The two-source kernel as a function of its tensors, and its grid."""
    blocks, chunks = ceil_div(l, BLOCK_L), ceil_div(d, BLOCK_D)
    sides = {"BLOCK_L": BLOCK_L, "BLOCK_D": BLOCK_D, "CHUNKS": chunks, "num_warps": WARPS}
    sizes = {"l": l, "d": d, "blocks": blocks}
    return _two_source_kernel.fixed(**sizes, TOKENS=tokens, DOT=dot, **sides), (b * blocks,)


@lru_cache(SIZES)
def _launch_sums(b: int, l: int, *widths: int) -> tuple[Callable[..., None], tuple[int]]:
    """The decision's gradient for pairs of these widths, and its grid."""
    blocks = ceil_div(l, SUMS_BLOCK_L)
    sides = {"BLOCK_L": SUMS_BLOCK_L, "BLOCK_D": BLOCK_D, "num_warps": WARPS}
    sizes = {"widths": widths, "l": l, "blocks": blocks, "PAIRS": len(widths)}
    return _decision_grad_kernel.fixed(**sizes, **sides), (b * blocks,)


def two_source(
    src: Tensor,
    decision: Tensor,
    first: Tensor,
    second: Tensor,
    quadrant: Tensor,
    tokens: bool,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out (b, l, d) of the module's formula; with `other` (b, l, d) also the decision's gradient.

    src: (b, l, d), contiguous. tokens: rows are tokens, else positions. The second result is (b, 4)
    float32, or None without `other`.
    """
    b, l, d = src.shape
    out, partial = torch.empty_like(src), None
    if other is not None:
        partial = src.new_empty((b, ceil_div(l, BLOCK_L), 4), dtype=torch.float32)
    if src.numel():
        kernel, grid = _launch(b, l, d, tokens, other is not None)
        with device_of(src):
            maps = decision.contiguous(), first, second, quadrant
            kernel(grid, src, other, out, partial, *maps)
    return out, None if partial is None else partial.sum(1)


def decision_grad(
    values: list[Tensor],
    gathered: list[Tensor],
    choice: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> Tensor:
    """Sum over the pairs of the decision's gradient: (b, 4) float32. All tensors contiguous."""
    b, l, _ = values[0].shape
    partial = values[0].new_empty((b, ceil_div(l, SUMS_BLOCK_L), 4), dtype=torch.float32)
    if b and l:
        kernel, grid = _launch_sums(b, l, *[value.shape[2] for value in values])
        tensors = tuple(values), tuple(gathered), partial, choice, tables, fine, coarse, quadrant
        with device_of(partial):
            kernel(grid, *tensors)
    return partial.sum(1)
