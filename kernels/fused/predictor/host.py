"""The Triton path of the predictor: one kernel forward; two kernels and three products backward.

Forward keeps nothing. In backward the first kernel computes every activation anew and goes back to
the second layer, the second goes on to x; cuBLAS forms the matrices' gradients g^T [h, 1], whose
added column is the gradient of the bias.

Beware when changing block sizes: the ptxas that comes with Triton 3.6 can lose a uniform register
of a matrix descriptor between two products (seen here with untransposed right-hand matrices),
which gives wrong numbers or an illegal access. Only the GPU tests at every width notice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from quadmamba.kernels.fused.launch import ceil_div
from quadmamba.kernels.fused.predictor.triton import (
    _fold_kernel,
    _forward_kernel,
    _input_grad_kernel,
    _recompute_kernel,
)

ONES = 8  # columns added to an activation, the first of ones: keeps rows 16 bytes aligned

FORWARD = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
RECOMPUTE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
INPUT_GRAD = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def _launch(options: dict[str, int], d: int) -> dict[str, int]:
    """Launch parameters for width d, with the number of chunks of the first layer's columns."""
    block_n = min(options["BLOCK_N"], max(16, triton.next_power_of_2(d)))
    return {**options, "BLOCK_N": block_n, "CHUNKS": ceil_div(d, block_n)}


def _halves(d: int) -> tuple[int, int]:
    """d as the largest power of two in it and the rest, rounded up to one: each at least 16."""
    largest = max(16, triton.next_power_of_2(d + 1) // 2)
    return largest, max(16, triton.next_power_of_2(max(d - largest, 1)))


def _sides(d: int, d2: int, d4: int) -> tuple[dict[str, int | bool], int]:
    """The parts of d and d2, and a power of two that covers d4."""
    (ka, kb), (da, db) = _halves(d), _halves(d2)
    sides = {"SPLIT": d > ka or d2 > da, "KA": ka, "KB": kb, "DA": da, "DB": db}
    return sides, max(16, triton.next_power_of_2(d4))


def _operands(x: Tensor, params: Sequence[Tensor], transpose: bool) -> tuple[Tensor, ...]:
    """Matrices in x's dtype, one after another, with the norm folded into the first; vectors.

    With `transpose` the matrices are followed by their transposes.
    """
    gain, shift, w1, b1, w2, b2, w3, b3, w4, b4 = (p.contiguous() for p in params)
    d, d2, d4 = w1.shape[0], w2.shape[0], w3.shape[0]
    matrices = x.new_empty((d * d + d2 * d + d4 * d2) * (2 if transpose else 1))
    bias = x.new_empty(d, dtype=torch.float32)
    _fold_kernel[(max(d, d2, d4),)](
        gain, shift, w1, b1, w2, w3, matrices, bias, d, d2, d4, TRANSPOSE=transpose, BLOCK=256
    )
    return matrices, bias, b2, b3, w4, b4


def forward(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    """Scores (rows) float32 of tokens x (rows, d), contiguous, float16 or bfloat16, d <= 256."""
    rows, d, d2, d4 = x.shape[0], x.shape[1], params[4].shape[0], params[6].shape[0]
    score = x.new_empty(rows, dtype=torch.float32)
    sides, width4 = _sides(d, d2, d4)
    launch = _launch(FORWARD, d)
    if rows:
        with torch.cuda.device_of(x):
            _forward_kernel[(ceil_div(rows, launch["BLOCK_M"]),)](
                x,
                *_operands(x, params, False),
                score,
                rows,
                d,
                d2,
                d4,
                eps,
                **sides,
                D4=width4,
                **launch,
            )
    return score


def backward(
    grad: Tensor, x: Tensor, params: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x (rows, d) and of the ten params, given that of the scores (rows)."""
    rows, d, d2, d4 = x.shape[0], x.shape[1], params[4].shape[0], params[6].shape[0]
    normed, h1, h2 = (x.new_empty(rows, width + ONES) for width in (d, d, d2))
    grad_x, g1, g2, g3 = (x.new_empty(rows, width) for width in (d, d, d2, d4))
    sides, width4 = _sides(d, d2, d4)
    first, second = _launch(RECOMPUTE, d), _launch(INPUT_GRAD, d)
    programs = ceil_div(rows, first["BLOCK_M"])
    partial = x.new_empty((programs, d4 + 1), dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            operands = _operands(x, params, True)
            _recompute_kernel[(programs,)](
                grad, x, *operands, normed, h1, g1, h2, g2, g3, partial, rows, d, d2, d4, eps,
                **sides, D4=width4, ONES=ONES, **first,
            )  # fmt: skip
            _input_grad_kernel[(ceil_div(rows, second["BLOCK_M"]),)](
                x, operands[0], g2, g1, grad_x, rows, d, d2, d4, eps, **sides, **second
            )
    products = (_product(g, h) for g, h in ((g1, normed), (g2, h1), (g3, h2)))
    grads = _param_grads(params, *products, partial.sum(0))
    return grad_x, [g.to(p.dtype) for g, p in zip(grads, params)]


def _product(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """g^T h in float32 without the added columns, and the first of these, the sum of g."""
    out = torch.mm(g.t(), h, out_dtype=torch.float32) if g.is_cuda else g.t().float() @ h.float()
    return out[:, :-ONES].contiguous(), out[:, -ONES].contiguous()


def _param_grads(
    params: Sequence[Tensor],
    layer1: tuple[Tensor, Tensor],
    layer2: tuple[Tensor, Tensor],
    layer3: tuple[Tensor, Tensor],
    last: Tensor,
) -> list[Tensor]:
    """Gradients of the params from those of the layers, the first with the norm folded in."""
    gain, shift, w1 = (p.float() for p in params[:3])
    product, b1 = layer1
    norm = (w1 * product).sum(0), (w1 * b1[:, None]).sum(0)
    w1 = product * gain + b1[:, None] * shift
    w4, b4 = last[:-1], last[-1:]
    return [*norm, w1, b1, *layer2, *layer3, torch.stack([-w4, w4]), torch.cat([-b4, b4])]
