"""`quadrant_choice` as torch.library ops: Triton for CUDA tensors, the reference on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadmamba.kernels.dispatch import triton_op
from quadmamba.kernels.fused.launch import check_half_or_single, triton_kernels
from quadmamba.kernels.fused.quadrant_choice.reference import (
    check_choice,
    choose,
    mean_scores,
    quadrant_choice_grad_ref,
)


def quadrant_choice(
    score: Tensor, pool: Tensor, count: Tensor, noise: Tensor | None = None, tau: float = 1.0
) -> Tensor:
    """One-hot choice (b, 4) of a quadrant, with the gradient of the softmax (paper Eq. 8 and 9).

    score: (b, ...) of l tokens, float32. pool: (l) integer, the quadrant 0 to 3 for which a token's
    score counts; count: (4) float32, how many tokens count for each; one without any is never
    chosen. The largest of mean score - log noise is chosen, the first where several are, and the
    gradient is that of softmax((mean score - log noise) / tau); noise: (b, 4), of the exponential
    distribution for a Gumbel-softmax sample, or None. Backward keeps the softmax alone. Runs are
    bit-equal.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError on CUDA without Triton.
    """
    check_choice(score, pool, count, noise, tau)
    return _choice(score, pool, count, noise, tau)[0]


@triton_op("quadmamba::quadrant_choice")
def _choice(
    score: Tensor, pool: Tensor, count: Tensor, noise: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice, the softmax, and the number of the chosen quadrant (b, 1) int32."""
    check_half_or_single("quadrant_choice", score)
    noise = None if noise is None else noise.contiguous()
    kernels = triton_kernels(__package__)
    return kernels.forward(score.contiguous(), pool.contiguous(), count.contiguous(), noise, tau)


@_choice.register_kernel("cpu")
def _choice_cpu(
    score: Tensor, pool: Tensor, count: Tensor, noise: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    hard, soft = choose(mean_scores(score, pool, count), noise, tau)
    return hard, soft, hard.argmax(1, keepdim=True).to(torch.int32)


@_choice.register_fake
def _choice_fake(
    score: Tensor, pool: Tensor, count: Tensor, noise: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    choice, soft = (score.new_empty((score.shape[0], 4)) for _ in range(2))
    return choice, soft, score.new_empty((score.shape[0], 1), dtype=torch.int32)


@triton_op("quadmamba::quadrant_choice_backward")
def _choice_backward(grad: Tensor, soft: Tensor, pool: Tensor, count: Tensor, tau: float) -> Tensor:
    kernels = triton_kernels(__package__)
    tensors = (tensor.contiguous() for tensor in (grad, soft, pool, count))
    return kernels.backward(*tensors, tau)


@_choice_backward.register_kernel("cpu")
def _choice_backward_cpu(
    grad: Tensor, soft: Tensor, pool: Tensor, count: Tensor, tau: float
) -> Tensor:
    return quadrant_choice_grad_ref(grad, soft, pool, count, tau)


@_choice_backward.register_fake
def _choice_backward_fake(
    grad: Tensor, soft: Tensor, pool: Tensor, count: Tensor, tau: float
) -> Tensor:
    return soft.new_empty((soft.shape[0], pool.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    score, pool, count, _, ctx.tau = inputs
    ctx.shape = score.shape
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], pool, count)


def _autograd(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    grad_score = _choice_backward(grad, *ctx.saved_tensors, ctx.tau)
    return grad_score.view(ctx.shape), None, None, None, None


_choice.register_autograd(_autograd, setup_context=_save)
