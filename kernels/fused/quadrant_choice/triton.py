"""Triton kernels of the choice: a program takes the scores of an image, or a block of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quadmamba.kernels.fused.jit import jit
from quadmamba.kernels.fused.launch import SIZES, ceil_div, device_of

BLOCK, WARPS = 1024, 4


@triton.jit
def _four(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor):
    """A vector of four numbers."""
    i = tl.arange(0, 4)
    return tl.where(i == 0, a, tl.where(i == 1, b, tl.where(i == 2, c, d)))


@jit(do_not_specialize=["l"])
def _choice_kernel(
    score: tl.tensor, pool: tl.tensor, count: tl.tensor, noise: tl.tensor, choice: tl.tensor,
    soft: tl.tensor, select: tl.tensor, l: tl.tensor, tau: tl.tensor, NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    a, b, c, d = (
        tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32),
    )  # fmt: skip
    start = 0
    while start < l:
        token = start + tl.arange(0, BLOCK)
        quadrant = tl.load(pool + token, mask=token < l, other=4)
        value = tl.load(score + image * l + token, mask=token < l, other=0.0).to(tl.float32)
        a += tl.where(quadrant == 0, value, 0.0)
        b += tl.where(quadrant == 1, value, 0.0)
        c += tl.where(quadrant == 2, value, 0.0)
        d += tl.where(quadrant == 3, value, 0.0)
        start += BLOCK
    i = tl.arange(0, 4)
    total = _four(tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0))
    tokens = tl.load(count + i)
    logit = total / tl.maximum(tokens, 1.0)
    if NOISE:
        logit -= tl.log(tl.load(noise + image * 4 + i))
    logit = tl.where(tokens > 0, logit, float("-inf"))
    best = tl.min(tl.where(logit == tl.max(logit, 0), i, 4), 0) % 4
    weight = tl.exp((logit - tl.max(logit, 0)) / tau)
    tl.store(soft + image * 4 + i, weight / tl.sum(weight, 0))
    tl.store(choice + image * 4 + i, tl.where(i == best, 1.0, 0.0))
    tl.store(select + image, best)


@jit(do_not_specialize=["l", "blocks"])
def _choice_grad_kernel(
    grad: tl.tensor, soft: tl.tensor, pool: tl.tensor, count: tl.tensor, out: tl.tensor,
    l: tl.tensor, blocks: tl.tensor, tau: tl.tensor, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    image = (pid // blocks).to(tl.int64)
    i = tl.arange(0, 4)
    g, share = tl.load(grad + image * 4 + i).to(tl.float32), tl.load(soft + image * 4 + i)
    along = tl.sum(g * share, 0)
    token = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = token < l
    at = tl.load(pool + token, mask=real, other=0)
    g, share = tl.load(grad + image * 4 + at).to(tl.float32), tl.load(soft + image * 4 + at)
    value = share * (g - along) / (tau * tl.load(count + at))
    tl.store(out + image * l + token, value, mask=real)


@lru_cache(SIZES)
def _launch(b: int, l: int, tau: float, noise: bool) -> tuple[Callable[..., None], tuple[int]]:
    """Forward, as a function of its tensors, and its grid."""
    kernel = _choice_kernel.fixed(l=l, tau=tau, NOISE=noise, BLOCK=BLOCK, num_warps=WARPS)
    return kernel, (b,)


@lru_cache(SIZES)
def _launch_backward(b: int, l: int, tau: float) -> tuple[Callable[..., None], tuple[int]]:
    """Backward, as a function of its tensors, and its grid."""
    blocks = ceil_div(l, BLOCK)
    kernel = _choice_grad_kernel.fixed(l=l, blocks=blocks, tau=tau, BLOCK=BLOCK, num_warps=WARPS)
    return kernel, (b * blocks,)


def forward(
    score: Tensor, pool: Tensor, count: Tensor, noise: Tensor | None, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice and the softmax, (b, 4) float32 each, and the number chosen, (b, 1) int32.

    All contiguous.
    """
    b, l = score.shape[0], pool.shape[0]
    choice, soft = (score.new_empty((b, 4), dtype=torch.float32) for _ in range(2))
    select = score.new_empty((b, 1), dtype=torch.int32)
    if b:
        kernel, grid = _launch(b, l, tau, noise is not None)
        with device_of(score):
            kernel(grid, score, pool, count, noise, choice, soft, select)
    return choice, soft, select


def backward(grad: Tensor, soft: Tensor, pool: Tensor, count: Tensor, tau: float) -> Tensor:
    """Gradient of the scores, (b, l) float32. All contiguous."""
    b, l = soft.shape[0], pool.shape[0]
    out = soft.new_empty((b, l))
    if b and l:
        kernel, grid = _launch_backward(b, l, tau)
        with device_of(soft):
            kernel(grid, grad, soft, pool, count, out)
    return out
