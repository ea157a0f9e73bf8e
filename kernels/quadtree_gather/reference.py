"""The quadtree order in plain PyTorch: two-source masked gather, its way back, their gradients.

A token t belongs to quadrant q(t); decision (b, 4) is one-hot, so m(t) = decision[q(t)] is 1 in the
selected quadrant. With P_fine and P_coarse the positions of a token in the two orders (design: two
levels of a quadtree),

    seq[p] = sum over t with P_fine(t) = p of m(t) x(t)
           + sum over t with P_coarse(t) = p of (1 - m(t)) x(t)
    out(t) = m(t) Y[P_fine(t)] + (1 - m(t)) Y[P_coarse(t)]

Both are differentiable in the decision too: that gradient is what teaches the predictor
(straight-through estimator). For either direction, with tokens v(t) and a sequence w[p],

    d decision[q] = sum over t in q of v(t) · (w[P_fine(t)] - w[P_coarse(t)])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quadmamba.kernels.quadtree_gather.checks import check_decision_grad, check_gather


def gather_in_ref(
    x: Tensor, decision: Tensor, fine: Tensor, coarse: Tensor, quadrant: Tensor
) -> Tensor:
    """Tokens to sequence, (b, l, d) to (b, l, d).

    decision: (b, 4). fine, coarse, quadrant: (l) integer. Raises ValueError for other shapes.
    """
    check_gather(x, decision, fine, coarse, quadrant)
    m = decision.to(x.dtype)[:, quadrant.long(), None]  # (b, l, 1)
    seq = x.new_zeros(x.shape).index_add(1, fine.long(), m * x)
    return seq.index_add(1, coarse.long(), (1 - m) * x)


def gather_out_ref(
    y: Tensor, decision: Tensor, fine: Tensor, coarse: Tensor, quadrant: Tensor
) -> Tensor:
    """Sequence back to tokens, (b, l, d) to (b, l, d).

    decision: (b, 4). fine, coarse, quadrant: (l) integer. Raises ValueError for other shapes.
    """
    check_gather(y, decision, fine, coarse, quadrant)
    m = decision.to(y.dtype)[:, quadrant.long(), None]  # (b, l, 1)
    return m * y[:, fine.long()] + (1 - m) * y[:, coarse.long()]


def quadrant_sums(
    tokens: Tensor, seq: Tensor, first: Tensor, second: Tensor, quadrant: Tensor
) -> Tensor:
    """Sum over the tokens of a quadrant of tokens · (seq[first] - seq[second]).

    tokens, seq: (b, l, d). first, second: (l) or (b, l) integer. quadrant: (l).
    Returns (b, 4), float32 (float64 for float64 tokens).
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    seq = seq.to(dtype)
    one, two = (
        seq.gather(1, i.long().expand(seq.shape[:2])[..., None].expand_as(seq))
        for i in (first, second)
    )
    dot = (tokens.to(dtype) * (one - two)).sum(-1)  # (b, l)
    with torch.autocast(dot.device.type, enabled=False):
        return dot @ F.one_hot(quadrant.long(), 4).to(dtype)


def decision_grad_ref(
    pairs: Sequence[tuple[Tensor, Tensor]],
    choice: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> Tensor:
    """Gradient of the decision where the sequence is read through tables. See `decision_grad`."""
    check_decision_grad(pairs, choice, tables, fine, coarse, quadrant)
    order = tables.long()[choice.long()]  # (b, l): the token at each position
    first, second = order[:, fine.long()], order[:, coarse.long()]
    return sum(quadrant_sums(v, w, first, second, quadrant) for v, w in pairs)
