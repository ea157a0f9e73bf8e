"""The Triton path of the predictor: two kernels forward, six backward, or a few more.

Narrow tokens pass through the whole chain in one kernel, forward and back. For wide ones, whose
chain would not fit the registers, cuBLAS multiplies and small kernels stand between its products.
Both keep the layers before their GELU in half precision and share the kernel that forms the
gradients of the matrices, as partial results that one more kernel adds up in a fixed order.

Beware when changing block sizes: the ptxas that comes with Triton 3.6 can lose a uniform register
of a matrix descriptor between two products, which gives wrong numbers or an illegal access. Only
the GPU tests at every width notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quadmamba.kernels.fused.jit import Kernel
from quadmamba.kernels.fused.launch import ceil_div, device_of, power_of_2
from quadmamba.kernels.fused.predictor.reference import empty_kept, widths
from quadmamba.kernels.fused.predictor.triton import _fold_kernel, _unfold_kernel
from quadmamba.kernels.fused.predictor.triton_chain import _backward_kernel, _forward_kernel
from quadmamba.kernels.fused.predictor.triton_layers import (
    _gelu_grad_kernel,
    _gelu_kernel,
    _head_grad_kernel,
    _head_kernel,
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


def forward(
    x: Tensor, params: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Scores (rows) float32 of tokens x (rows, d), contiguous, float16 or bfloat16.

    With `keep` also what `backward` wants, see `empty_kept`.
    """
    run = _forward_chain if x.shape[1] <= CHAIN_MAX_D else _forward_layers
    if not x.shape[0]:
        return x.new_empty(0, dtype=torch.float32), empty_kept(x, params) if keep else []
    with device_of(x):
        return run(x, [p.contiguous() for p in params], eps, keep)


def backward(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x (rows, d) and of the ten params, given that of the scores (rows)."""
    if not x.shape[0]:
        return torch.empty_like(x), [torch.zeros_like(p) for p in params]
    run = _backward_chain if x.shape[1] <= CHAIN_MAX_D else _backward_layers
    with device_of(x):
        params = [p.contiguous() for p in params]
        grad_x, g, head = run(grad, x, kept, params)
        partial = _weight_grads(g, (x, *kept[:2]), kept[3])
        return grad_x, _sum(params, partial, head)


def _fold(params: Sequence[Tensor], matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Fill `matrices`, see `empty_kept`; returns the three biases in `dtype`."""
    d, d2, d4 = widths(params)
    bias = matrices.new_empty(d + d2 + d4, dtype=dtype)
    _fold_kernel[(max(d, d2, d4),)](*params[:8], matrices, bias, d, d2, d4, BLOCK=256)
    return bias


def _sum(params: Sequence[Tensor], partial: Tensor, head: Tensor) -> list[Tensor]:
    """Gradients of the params from the partial ones of `_weight_grads` and of the last layer."""
    (parts, size), (count, programs) = partial.shape, head.shape
    totals = partial.new_empty(size + count)
    blocks = ceil_div(size, SUM["BLOCK_C"]) + count
    _sum_kernel[(blocks,)](partial, head, totals, parts, size, programs, **SUM)
    grads = [torch.empty_like(p) for p in params]
    d, d2, d4 = widths(params)
    _unfold_kernel[(ceil_div(d, 16),)](
        totals, *params[:3], *grads, d, d2, d4, BLOCK_R=64, BLOCK_C=16, BLOCK=512
    )
    return grads


def _parts(width: int, least: int) -> tuple[int, int, bool]:
    """The largest power of two in width, the rest rounded up to one, and whether there is a rest.

    Each is at least `least`; where both are that, they become one part.
    """
    largest = max(least, power_of_2(width + 1) // 2)
    rest = max(least, power_of_2(max(width - largest, 1)))
    if largest == rest and width > largest:
        return 2 * largest, least, False
    return largest, rest, width > largest


@lru_cache
def _chain_sides(backward: bool, d: int, d2: int, d4: int) -> dict[str, int | bool]:
    """Launch parameters of a kernel of the chain."""
    options = BACKWARD if backward else FORWARD
    (ka, kb, split), (da, db, split2) = _parts(d, 16), _parts(d2, 16)
    block_n = min(options["BLOCK_N"], max(16, power_of_2(d)))
    sides = {"SPLIT": split or split2, "KA": ka, "KB": kb, "DA": da, "DB": db}
    sides |= {"D4": max(16, power_of_2(d4)), "CHUNKS": ceil_div(d, block_n)}
    return {"d": d, "d2": d2, "d4": d4, **sides, **options, "BLOCK_N": block_n}


def _forward_chain(
    x: Tensor, params: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    rows, score = x.shape[0], x.new_empty(x.shape[0], dtype=torch.float32)
    *kept, matrices = empty_kept(x if keep else x[:0], params)
    bias = _fold(params, matrices, torch.float32)
    sides = _chain_sides(False, *widths(params))
    _forward_kernel[(ceil_div(rows, sides["BLOCK_M"]),)](
        x, matrices, bias, *params[8:], score, *kept, rows, eps, KEEP=keep, **sides
    )
    return score, [*kept, matrices] if keep else []


def _backward_chain(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradient of x, those before the GELUs, and sums for the gap between the last layer's rows.

    The sums, (d4 + 1, programs), are still to be added up.
    """
    grad_x, *g = (torch.empty_like(t) for t in (x, *kept[:3]))
    sides = _chain_sides(True, *widths(params))
    programs = ceil_div(x.shape[0], sides["BLOCK_M"])
    head = x.new_empty((sides["d4"] + 1, programs), dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad, x, *kept, *params[8:], *g, grad_x, head, x.shape[0], **sides
    )
    return grad_x, g, head


def _matrices(flat: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the three matrices, (d, d), (d2, d), (d4, d2)."""
    shapes = [p.shape for p in params[2:8:2]]
    sizes = [shape.numel() for shape in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return tuple(part.view(shape) for part, shape in zip(parts, shapes))


def _row_sides(width: int) -> dict[str, int]:
    """Launch parameters of a kernel whose programs hold whole rows."""
    block_d = power_of_2(width)
    return {"BLOCK_R": max(1, TILE // block_d), "BLOCK_D": block_d}


def _flat(kernel: Kernel, *tensors: Tensor) -> Tensor:
    """Launch an elementwise kernel on tensors of one size; returns the last, where it writes."""
    size = tensors[0].numel()
    kernel[(ceil_div(size, TILE),)](*tensors, size, BLOCK=TILE)
    return tensors[-1]


def _forward_layers(
    x: Tensor, params: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    (rows, d), score = x.shape, x.new_empty(x.shape[0], dtype=torch.float32)
    *_, matrices = empty_kept(x[:0], params)
    bias = _fold(params, matrices, x.dtype)
    h, stats = torch.empty_like(x), x.new_empty((rows, 2), dtype=torch.float32)
    sides, pre = _row_sides(d), []
    grid = (ceil_div(rows, sides["BLOCK_R"]),)
    _standardise_kernel[grid](x, h, stats, rows, d, eps, **sides)
    for b, w in zip(bias.split(widths(params)), _matrices(matrices, params)):
        h = _flat(_gelu_kernel, pre[-1], torch.empty_like(pre[-1])) if pre else h
        pre.append(torch.addmm(b, h, w.t()))
    d4, sides = params[6].shape[0], _row_sides(params[6].shape[0])
    block_r, block_d = sides["BLOCK_R"], sides["BLOCK_D"]
    _head_kernel[(ceil_div(rows, block_r),)](
        pre[-1], *params[8:], score, rows, d4, BLOCK_R=block_r, D4=block_d
    )
    return score, [*pre, stats, matrices] if keep else []


def _backward_layers(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """As `_backward_chain`."""
    (p1, p2, p3, stats, matrices), (rows, d) = kept, x.shape
    d4, sides = params[6].shape[0], _row_sides(params[6].shape[0])
    programs = ceil_div(rows, sides["BLOCK_R"] * HEAD_TILES)
    head, g3 = x.new_empty((d4 + 1, programs), dtype=torch.float32), torch.empty_like(p3)
    _head_grad_kernel[(programs,)](
        grad, p3, *params[8:], g3, head, rows, d4,
        TILES=HEAD_TILES, BLOCK_R=sides["BLOCK_R"], D4=sides["BLOCK_D"],
    )  # fmt: skip
    w1, w2, w3 = _matrices(matrices, params)
    g2 = _flat(_gelu_grad_kernel, p2, g3 @ w3)
    g1 = _flat(_gelu_grad_kernel, p1, g2 @ w2)
    grad_x, sides = g1 @ w1, _row_sides(d)
    _standardise_grad_kernel[(ceil_div(rows, sides["BLOCK_R"]),)](
        x, stats, grad_x, rows, d, **sides
    )
    return grad_x, [g1, g2, g3], head


@lru_cache
def _weight_sides(width_g: int, width: int) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """Blocks of columns and of rows of a matrix's gradient, and the kernel's launch parameters."""
    options = next((options for most, options in WEIGHT_GRAD if width_g <= most), WIDER)
    da, db, split = (WIDER_ROWS, 64, False) if options is WIDER else _parts(width_g, 64)
    blocks = ceil_div(width, options["BLOCK_N"]), 1 if split else ceil_div(width_g, da)
    sides = {"width_g": width_g, "width": width, "SPLIT": split, "DA": da, "DB": db}
    return blocks, {**sides, **options}


def _weight_grads(g: Sequence[Tensor], inputs: Sequence[Tensor], stats: Tensor) -> Tensor:
    """Partial gradients (parts, ·) of the three matrices, the first folded, then of the biases.

    inputs: x, and the layers before their GELU.
    """
    rows, most = stats.shape[0], CHAIN_PARTS if g[0].shape[1] <= CHAIN_MAX_D else LAYERS_PARTS
    span = 64 * ceil_div(rows, 64 * most)  # tokens of a part
    parts = ceil_div(rows, span)
    widths_g, sizes = zip(*((a.shape[1], a.shape[1] * b.shape[1]) for a, b in zip(g, inputs)))
    partial = stats.new_empty((parts, sum(sizes) + sum(widths_g)))
    at, bias_at = 0, sum(sizes)
    for i, (gradient, source) in enumerate(zip(g, inputs)):
        (columns, blocks), sides = _weight_sides(gradient.shape[1], source.shape[1])
        _weight_grad_kernel[(columns, parts, blocks)](
            gradient, source, stats, partial, at, bias_at, partial.shape[1], rows,
            span // sides["BLOCK_M"], NORM=i == 0, **sides,
        )  # fmt: skip
        at, bias_at = at + sizes[i], bias_at + widths_g[i]
    return partial
