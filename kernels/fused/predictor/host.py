"""The Triton path of the predictor: two kernels forward, six backward, or a few more.

Narrow tokens pass through the whole chain in one kernel, forward and back. For wide ones, whose
chain would not fit the registers, cuBLAS multiplies and small kernels stand between its products.
Both keep the layers before their GELU in half precision and share the kernel that forms the
gradients of the matrices, as partial results that one more kernel adds up in a fixed order.

Sizes and constants of the kernels: see `launches`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quadmamba.kernels.fused.launch import device_of
from quadmamba.kernels.fused.predictor import launches
from quadmamba.kernels.fused.predictor.reference import empty_kept, widths


def forward(
    x: Tensor, params: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Scores (rows) float32 of tokens x (rows, d), contiguous, float16 or bfloat16.

    With `keep` also what `backward` wants, see `empty_kept`.
    """
    run = _forward_chain if x.shape[1] <= launches.CHAIN_MAX_D else _forward_layers
    if not x.shape[0]:
        return x.new_empty(0, dtype=torch.float32), empty_kept(x, params) if keep else []
    with device_of(x):
        return run(x, _contiguous(params), eps, keep)


def backward(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    params: Sequence[Tensor],
    total: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x (rows, d) and of the ten params, given that of the scores (rows).

    total: a tensor like x to which the gradient of x is added, and which is then returned for it.
    """
    if not x.shape[0]:
        grad_x = torch.empty_like(x) if total is None else total
        return grad_x, [torch.zeros_like(p) for p in params]
    run = _backward_chain if x.shape[1] <= launches.CHAIN_MAX_D else _backward_layers
    with device_of(x):
        params = _contiguous(params)
        end = launches.end(x.shape[0], widths(params))
        head = x.new_empty(end.head, dtype=torch.float32)
        grad_x, g = run(grad, x, kept, params, head, total)
        partial = head.new_empty(end.partial)
        for i, weight_grad in enumerate(end.weights):
            weight_grad(g[i], kept[i - 1] if i else x, kept[3], partial)
        totals = head.new_empty(end.count)
        end.sum(partial, head, totals)
        grads = [torch.empty_like(p) for p in params]
        end.unfold(totals, *params[:3], *grads)
        return grad_x, grads


def _contiguous(params: Sequence[Tensor]) -> Sequence[Tensor]:
    if all(map(Tensor.is_contiguous, params)):
        return params
    return [p.contiguous() for p in params]


def _forward_chain(
    x: Tensor, params: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    rows, sizes = x.shape[0], widths(params)
    start = launches.start(sizes)
    score, bias = (x.new_empty(n, dtype=torch.float32) for n in (rows, sum(sizes)))
    *kept, matrices = empty_kept(x, params) if keep else (*[None] * 4, x.new_empty(start.count))
    start.fold(*params[:8], matrices, bias)
    run = launches.chain_forward(rows, sizes, eps, keep)
    run(x, matrices, bias, *params[8:], score, *kept)
    return score, [*kept, matrices] if keep else []


def _backward_chain(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    params: Sequence[Tensor],
    head: Tensor,
    total: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of x, and those before the GELUs.

    head: for sums for the gap between the last layer's rows, which are still to be added up.
    """
    grad_x = torch.empty_like(x) if total is None else total
    g = [torch.empty_like(pre) for pre in kept[:3]]
    run = launches.chain_backward(x.shape[0], widths(params), total is not None)
    run(grad, x, *kept, *params[8:], *g, grad_x, head)
    return grad_x, g


def _forward_layers(
    x: Tensor, params: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    rows, sizes = x.shape[0], widths(params)
    start, run = launches.start(sizes), launches.layers_forward(rows, sizes, eps)
    score, stats = (x.new_empty(n, dtype=torch.float32) for n in (rows, (rows, 2)))
    matrices, bias, h = x.new_empty(start.count), x.new_empty(sum(sizes)), torch.empty_like(x)
    start.fold(*params[:8], matrices, bias)
    w1, w2, w3 = [matrices.as_strided(*view) for view in start.views]
    b1, b2, b3 = bias.split_with_sizes(sizes)
    run.standardise(x, h, stats)
    p1 = F.linear(h, w1, b1)
    run.gelu1(p1, h)
    p2 = F.linear(h, w2, b2)
    h = torch.empty_like(p2)
    run.gelu2(p2, h)
    p3 = F.linear(h, w3, b3)
    run.head(p3, *params[8:], score)
    return score, [p1, p2, p3, stats, matrices] if keep else []


def _backward_layers(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    params: Sequence[Tensor],
    head: Tensor,
    total: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """As `_backward_chain`."""
    (p1, p2, p3, stats, matrices), sizes = kept, widths(params)
    run = launches.layers_backward(x.shape[0], sizes, total is not None)
    w1, w2, w3 = [matrices.as_strided(*view) for view in launches.start(sizes).views]
    g3 = torch.empty_like(p3)
    run.head(grad, p3, *params[8:], g3, head)
    g2 = torch.mm(g3, w3)
    run.gelu2(p2, g2)
    g1 = torch.mm(g2, w2)
    run.gelu1(p1, g1)
    inner = torch.mm(g1, w1)
    grad_x = inner if total is None else total
    run.standardise(x, stats, inner, grad_x)
    return grad_x, [g1, g2, g3]
