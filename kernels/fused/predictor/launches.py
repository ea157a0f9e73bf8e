"""The launches of the predictor's Triton path for one size, made once: blocks, grids, constants.

Beware when changing block sizes: the ptxas that comes with Triton 3.6 can lose a uniform register
of a matrix descriptor between two products, which gives wrong numbers or an illegal access. Only
the GPU tests at every width notice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from quadmamba.kernels.fused.jit import Kernel
from quadmamba.kernels.fused.launch import SIZES, ceil_div, power_of_2, row_block
from quadmamba.kernels.fused.predictor.triton import _fold_kernel, _unfold_kernel
from quadmamba.kernels.fused.predictor.triton_chain import _chain_grad_kernel, _chain_kernel
from quadmamba.kernels.fused.predictor.triton_layers import (
    _head_grad_kernel,
    _head_kernel,
    _layer_gelu_grad_kernel,
    _layer_gelu_kernel,
    _standardise_grad_kernel,
    _standardise_kernel,
)
from quadmamba.kernels.fused.predictor.triton_weights import _sum_kernel, _weight_grad_kernel

CHAIN_MAX_D = 256  # widest tokens of the chain; at 384 its registers spill

FORWARD = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
BACKWARD = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
WEIGHT_GRAD = (  # of a matrix's gradient: most rows of the matrix, and launch parameters
    (64, {"BLOCK_M": 64, "BLOCK_N": 32, "STAGES": 3, "num_warps": 4}),
    (128, {"BLOCK_M": 32, "BLOCK_N": 64, "STAGES": 4, "num_warps": 4}),
    (256, {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 3, "num_warps": 4}),
    (384, {"BLOCK_M": 64, "BLOCK_N": 128, "STAGES": 3, "num_warps": 8}),
)
WIDER = {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 3, "num_warps": 8}
WIDER_ROWS = 256  # rows of the matrix at a time, beyond that table
CHAIN_PARTS, LAYERS_PARTS = 176, 44  # partial results of the matrices' gradients
SUM = {"BLOCK_R": 32, "BLOCK_C": 64, "BLOCK": 2048}
TILE = 2048  # elements of a program's tile in the kernels between products
HEAD_TILES = 4

Launch = Callable[..., None]  # of its tensors
View = tuple[tuple[int, int], tuple[int, int], int]  # shape, strides, offset
Widths = tuple[int, int, int]  # d, d2, d4


class Start(NamedTuple):
    """The matrices and biases, the norm folded in. count: numbers of `matrices`, see `empty_kept`.

    views: the three matrices in them.
    """

    fold: Launch
    count: int
    views: tuple[View, View, View]


class LayersForward(NamedTuple):
    """The kernels between the products."""

    standardise: Launch
    gelu1: Launch
    gelu2: Launch
    head: Launch


class LayersBackward(NamedTuple):
    """The kernels between the products."""

    head: Launch
    gelu2: Launch
    gelu1: Launch
    standardise: Launch


class End(NamedTuple):
    """The gradients of the params, and shapes of what is summed for them.

    head: for the last layer. partial: for the others. count: numbers that the sums leave.
    """

    head: tuple[int, int]
    partial: tuple[int, int]
    count: int
    weights: tuple[Launch, Launch, Launch]
    sum: Launch
    unfold: Launch


def _fix(kernel: Kernel, grid: tuple[int, ...], **constants: Any) -> Launch:
    """The kernel as a function of its tensors."""
    return partial(kernel.fixed(**constants), grid)


def _parts(width: int, least: int) -> tuple[int, int, bool]:
    """The largest power of two in width, the rest rounded up to one, and whether there is a rest.

    Each is at least `least`; where both are that, they become one part.
    """
    largest = max(least, power_of_2(width + 1) // 2)
    rest = max(least, power_of_2(max(width - largest, 1)))
    if largest == rest and width > largest:
        return 2 * largest, least, False
    return largest, rest, width > largest


def _chain_sides(options: dict[str, int], widths: Widths) -> dict[str, int | bool]:
    """Constants of a kernel of the chain."""
    d, d2, d4 = widths
    (ka, kb, split), (da, db, split2) = _parts(d, 16), _parts(d2, 16)
    block_n = min(options["BLOCK_N"], max(16, power_of_2(d)))
    sides = {"SPLIT": split or split2, "KA": ka, "KB": kb, "DA": da, "DB": db}
    sides |= {"D4": max(16, power_of_2(d4)), "CHUNKS": ceil_div(d, block_n)}
    return {"d": d, "d2": d2, "d4": d4, **sides, **options, "BLOCK_N": block_n}


@lru_cache(SIZES)
def start(widths: Widths) -> Start:
    """The same for any number of tokens."""
    d, d2, d4 = widths
    shapes, views, count = ((d, d), (d2, d), (d4, d2)), [], 0
    for rows, width in shapes:
        views.append(((rows, width), (width, 1), count))
        count += rows * width
    fold = _fix(_fold_kernel, (max(widths),), d=d, d2=d2, d4=d4, BLOCK=256)
    return Start(fold, 2 * count, tuple(views))


@lru_cache(SIZES)
def chain_forward(rows: int, widths: Widths, eps: float, keep: bool) -> Launch:
    """For (rows, d) tokens. keep: whether backward will want something."""
    sides, grid = _chain_sides(FORWARD, widths), (ceil_div(rows, FORWARD["BLOCK_M"]),)
    return _fix(_chain_kernel, grid, rows=rows, eps=eps, KEEP=keep, **sides)


@lru_cache(SIZES)
def chain_backward(rows: int, widths: Widths, add: bool) -> Launch:
    """For (rows, d) tokens. add: whether their gradient is added to another."""
    sides, grid = _chain_sides(BACKWARD, widths), (ceil_div(rows, BACKWARD["BLOCK_M"]),)
    return _fix(_chain_grad_kernel, grid, rows=rows, ADD=add, **sides)


def _head_programs(rows: int, d4: int) -> int:
    """Programs that take the last layer's gradient between products."""
    return ceil_div(rows, row_block(d4, TILE)[0] * HEAD_TILES)


def _flat(kernel: Kernel, size: int) -> Launch:
    """An elementwise kernel."""
    return _fix(kernel, (ceil_div(size, TILE),), size=size, BLOCK=TILE)


@lru_cache(SIZES)
def layers_forward(rows: int, widths: Widths, eps: float) -> LayersForward:
    """For (rows, d) tokens."""
    d, d2, d4 = widths
    (block_r, block_d), (head_r, head_d) = row_block(d, TILE), row_block(d4, TILE)
    sides = {"BLOCK_R": block_r, "BLOCK_D": block_d}
    grid, head_grid = (ceil_div(rows, block_r),), (ceil_div(rows, head_r),)
    return LayersForward(
        _fix(_standardise_kernel, grid, rows=rows, d=d, eps=eps, **sides),
        _flat(_layer_gelu_kernel, rows * d),
        _flat(_layer_gelu_kernel, rows * d2),
        _fix(_head_kernel, head_grid, rows=rows, d4=d4, BLOCK_R=head_r, D4=head_d),
    )


@lru_cache(SIZES)
def layers_backward(rows: int, widths: Widths, add: bool) -> LayersBackward:
    """For (rows, d) tokens. add: whether their gradient is added to another."""
    d, d2, d4 = widths
    (block_r, block_d), (head_r, head_d) = row_block(d, TILE), row_block(d4, TILE)
    sides = {"ADD": add, "BLOCK_R": block_r, "BLOCK_D": block_d}
    head_sides = {"TILES": HEAD_TILES, "BLOCK_R": head_r, "D4": head_d}
    return LayersBackward(
        _fix(_head_grad_kernel, (_head_programs(rows, d4),), rows=rows, d4=d4, **head_sides),
        _flat(_layer_gelu_grad_kernel, rows * d2),
        _flat(_layer_gelu_grad_kernel, rows * d),
        _fix(_standardise_grad_kernel, (ceil_div(rows, block_r),), rows=rows, d=d, **sides),
    )


def _weight_grad(width_g: int, width: int, parts: int, span: int, **others: int | bool) -> Launch:
    """The gradient of a (width_g, width) matrix, in parts of `span` tokens."""
    options = next((options for most, options in WEIGHT_GRAD if width_g <= most), WIDER)
    da, db, split = (WIDER_ROWS, 64, False) if options is WIDER else _parts(width_g, 64)
    columns, blocks = ceil_div(width, options["BLOCK_N"]), 1 if split else ceil_div(width_g, da)
    sides = {"width_g": width_g, "width": width, "SPLIT": split, "DA": da, "DB": db}
    tiles, grid = span // options["BLOCK_M"], (columns, parts, blocks)
    return _fix(_weight_grad_kernel, grid, tiles=tiles, **others, **sides, **options)


@lru_cache(SIZES)
def end(rows: int, widths: Widths) -> End:
    """For (rows, d) tokens. All partial sums add up in a fixed order."""
    d, d2, d4 = widths
    is_chain = d <= CHAIN_MAX_D
    most = CHAIN_PARTS if is_chain else LAYERS_PARTS
    span = 64 * ceil_div(rows, 64 * most)  # tokens of a part
    parts, sizes = ceil_div(rows, span), ((d, d), (d2, d), (d4, d2))
    at, bias_at, weights = 0, d * d + d2 * d + d4 * d2, []
    size = bias_at + sum(widths)
    for i, (width_g, width) in enumerate(sizes):
        places = {"out_at": at, "bias_at": bias_at, "stride": size, "rows": rows, "NORM": i == 0}
        weights.append(_weight_grad(width_g, width, parts, span, **places))
        at, bias_at = at + width_g * width, bias_at + width_g
    programs = ceil_div(rows, BACKWARD["BLOCK_M"]) if is_chain else _head_programs(rows, d4)
    grid, count = (ceil_div(size, SUM["BLOCK_C"]) + d4 + 1,), size + d4 + 1
    sides = {"BLOCK_R": 64, "BLOCK_C": 16, "BLOCK": 512}
    return End(
        (d4 + 1, programs),
        (parts, size),
        count,
        tuple(weights),
        _fix(_sum_kernel, grid, parts=parts, size=size, programs=programs, **SUM),
        _fix(_unfold_kernel, (ceil_div(d, 16),), d=d, d2=d2, d4=d4, **sides),
    )
