"""The quadtree predictor in plain PyTorch.

    score = log_softmax(W4 gelu(W3 gelu(W2 gelu(W1 norm(x) + b1) + b2) + b3) + b4)[0]

params are, in this order: norm weight and bias (d), W1 (d, d), b1, W2 (d2, d), b2, W3 (d4, d2), b3,
W4 (2, d4), b4. With z the second logit less the first, the score is -softplus(z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quadmamba.kernels.fused.layer_norm.reference import layer_norm_grad_ref, layer_norm_ref


def check_predictor(x: Tensor, params: Sequence[Tensor]) -> None:
    """Raise ValueError unless x is floating (..., d) and params are the ten of a predictor."""
    op = "predictor_score"
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"{op}: expected floating x (..., d), got {x.dtype} {tuple(x.shape)}")
    if len(params) != 10 or any(p.dim() != 2 for p in params[2::2]):
        raise ValueError(
            f"{op}: expected 10 params: norm weight and bias, then four times a matrix and a bias; "
            f"got shapes {[tuple(p.shape) for p in params]}"
        )
    d, d2, d4 = x.shape[-1], params[4].shape[0], params[6].shape[0]
    shapes = [(d,), (d,), (d, d), (d,), (d2, d), (d2,), (d4, d2), (d4,), (2, d4), (2,)]
    for i, (param, shape) in enumerate(zip(params, shapes)):
        if tuple(param.shape) != shape or param.device != x.device:
            raise ValueError(
                f"{op}: expected params[{i}] of shape {shape} on {x.device}, "
                f"got {tuple(param.shape)} on {param.device}"
            )


def widths(params: Sequence[Tensor]) -> tuple[int, int, int]:
    """d, d2 and d4 of the ten params."""
    return params[2].shape[0], params[4].shape[0], params[6].shape[0]


def empty_kept(x: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """What the Triton kernels keep for backward beside x (..., d) and params, not yet filled.

    p1, p2, p3 (rows, width): the layers before their GELU. stats (rows, 2) float32: mean and 1 /
    deviation of each token. matrices: the first three in the dtype of x, the norm folded into the
    first, and their transposes.
    """
    d, d2, d4 = widths(params)
    rows = math.prod(x.shape[:-1])
    pre = [x.new_empty((rows, width)) for width in (d, d2, d4)]
    stats = x.new_empty((rows, 2), dtype=torch.float32)
    return [*pre, stats, x.new_empty(2 * (d * d + d2 * d + d4 * d2))]


def _activations(x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    """norm(x), the three layers before their GELU, and the logits."""
    layers = [layer_norm_ref(x, params[0], params[1], eps)]
    with torch.autocast(x.device.type, enabled=False):
        for i in range(2, 10, 2):
            inner = F.gelu(layers[-1]) if i > 2 else layers[-1]
            layers.append(F.linear(inner, params[i].to(x.dtype), params[i + 1].to(x.dtype)))
    return layers


def predictor_score_ref(x: Tensor, params: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Score of each token, (..., d) to (...), float32 (float64 for float64 x).

    Matrices are cast to the dtype of x. Raises ValueError for shapes that do not fit.
    """
    check_predictor(x, params)
    logits = _activations(x, params, eps)[-1]
    return logits.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)[..., 0]


def predictor_grad_ref(
    grad: Tensor, x: Tensor, params: Sequence[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of the ten params, every activation computed anew."""
    tokens, score_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, 1)
    normed, *pre, logits = _activations(tokens, params, eps)
    softmax = logits.to(score_grad.dtype).softmax(-1)[:, 1:]
    g = (score_grad * torch.cat([softmax, -softmax], 1)).to(x.dtype)  # (tokens, 2)
    grads: list[Tensor] = []
    for i, below in zip(range(8, 0, -2), (*pre[::-1], None)):
        inner = normed if below is None else F.gelu(below)
        grads = [g.t() @ inner, g.sum(0), *grads]
        g = g @ params[i].to(x.dtype)
        g = g if below is None else torch.ops.aten.gelu_backward(g, below)
    grad_x, *norm_grads = layer_norm_grad_ref(g, tokens, params[0], eps)
    grads = [p.to(like.dtype) for p, like in zip([*norm_grads, *grads], params)]
    return grad_x.to(x.dtype).view(x.shape), grads
