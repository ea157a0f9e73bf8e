"""The quadtree order in plain PyTorch: two-source masked gather, its way back, and their gradients by autograd.

A token t belongs to quadrant q(t); decision (b, 4) is one-hot, so m(t) = decision[q(t)] is 1 in the selected quadrant.
With P_fine and P_coarse the positions of a token in the two orders (design: two levels of a quadtree),

    seq[p] = sum over t with P_fine(t) = p of m(t) x(t)  +  sum over t with P_coarse(t) = p of (1 - m(t)) x(t)
    out(t) = m(t) Y[P_fine(t)] + (1 - m(t)) Y[P_coarse(t)]

Both are differentiable in the decision too: that gradient is what teaches the predictor (straight-through estimator).
"""

from __future__ import annotations

from torch import Tensor

from quadmamba.kernels.quadtree_gather.checks import check_gather


def gather_in_ref(x: Tensor, decision: Tensor, fine: Tensor, coarse: Tensor, quadrant: Tensor) -> Tensor:
    """Tokens to sequence. x: (b, l, d), decision: (b, 4), fine, coarse, quadrant: (l) integer. Returns (b, l, d)."""
    check_gather(x, decision, fine, coarse, quadrant)
    m = decision.to(x.dtype)[:, quadrant.long(), None]  # (b, l, 1)
    seq = x.new_zeros(x.shape).index_add(1, fine.long(), m * x)
    return seq.index_add(1, coarse.long(), (1 - m) * x)


def gather_out_ref(y: Tensor, decision: Tensor, fine: Tensor, coarse: Tensor, quadrant: Tensor) -> Tensor:
    """Sequence back to tokens. y: (b, l, d), decision: (b, 4), fine, coarse, quadrant: (l). Returns (b, l, d)."""
    check_gather(y, decision, fine, coarse, quadrant)
    m = decision.to(y.dtype)[:, quadrant.long(), None]  # (b, l, 1)
    return m * y[:, fine.long()] + (1 - m) * y[:, coarse.long()]
