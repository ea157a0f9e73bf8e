"""The choice of a quadrant in plain PyTorch, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def check_choice(
    score: Tensor, pool: Tensor, count: Tensor, noise: Tensor | None, tau: float
) -> None:
    """Raise ValueError unless the arguments fit together, as `quadrant_choice` describes them."""
    b, tokens = score.shape[0], score.shape[1:].numel()
    if score.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"quadrant_choice: expected scores in float32, got {score.dtype}")
    is_index = pool.dtype in (torch.int32, torch.int64)
    if pool.shape != (tokens,) or not is_index or count.shape != (4,):
        raise ValueError(
            f"quadrant_choice: expected an integer pool of the {tokens} tokens and four counts, "
            f"got {pool.dtype} {tuple(pool.shape)} and {tuple(count.shape)}"
        )
    if not count.is_floating_point():
        raise ValueError(f"quadrant_choice: expected counts in float32, got {count.dtype}")
    if noise is not None and noise.shape != (b, 4):
        raise ValueError(f"quadrant_choice: expected noise ({b}, 4), got {tuple(noise.shape)}")
    if tau <= 0:
        raise ValueError(f"quadrant_choice: expected a temperature above 0, got {tau}")


def quadrant_choice_ref(
    score: Tensor, pool: Tensor, count: Tensor, noise: Tensor | None = None, tau: float = 1.0
) -> Tensor:
    """The choice, (b, 4), by autograd; arguments as in `quadrant_choice`."""
    return straight_through(*choose(mean_scores(score, pool, count), noise, tau))


def mean_scores(score: Tensor, pool: Tensor, count: Tensor) -> Tensor:
    """Mean (b, 4) of the scores (b, ...) of each quadrant; -inf where none counts for it."""
    member = pool == torch.arange(4, device=pool.device)[:, None]  # (4, l)
    total = torch.where(member, score.flatten(1)[:, None], 0).sum(-1)
    return (total / count.clamp(min=1)).masked_fill(count == 0, float("-inf"))


def choose(logits: Tensor, noise: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    """One-hot choice of the largest of the logits - log noise, and their softmax; (b, 4) each."""
    if noise is not None:
        logits = logits - noise.log()
    return one_hot(logits), (logits / tau).softmax(-1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def one_hot(values: Tensor) -> Tensor:
    """1 at the largest of each row of (b, 4), else 0."""
    return torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)


def quadrant_choice_grad_ref(
    grad: Tensor, soft: Tensor, pool: Tensor, count: Tensor, tau: float
) -> Tensor:
    """Gradient of the scores (b, l) from that of the choice (b, 4)."""
    inner = soft * (grad - (grad * soft).sum(-1, keepdim=True)) / (tau * count.clamp(min=1))
    return inner[:, pool.long()]
