"""The learned part of the quadtree: a score for each token, the choice of one quadrant an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadmamba.kernels.fused import predictor_score
from quadmamba.kernels.fused.quadrant_choice import (
    choose,
    mean_scores,
    quadrant_choice,
    straight_through,
)
from quadmamba.models.layers import LayerNorm, is_fused
from quadmamba.models.orders import QuadMaps


class QuadPredictor(nn.Module):
    """Score of each token (paper Eq. 4 and 7, without Eq. 5-6, as in the official code).

    LN, Linear d -> d, GELU, Linear d -> d/2, GELU, Linear d/2 -> d/4, GELU, Linear d/4 -> 2,
    log-softmax, of which channel 0 is the score. (b, h, w, d) -> (b, h, w) in float32 (float64 for
    float64 tokens).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4:
            raise ValueError(f"QuadPredictor: expected at least 4 inner channels, got {dim}")
        self.embed = nn.Sequential(LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        if is_fused(x):
            layers = self.layers()
            params = [p for layer in layers for p in (layer.weight, layer.bias)]
            return predictor_score(x, params, layers[0].eps)
        logits = self.score(self.embed(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1)[..., 0]

    def layers(self) -> tuple[nn.Module, ...]:
        """The norm and the four linear layers."""
        norm, first, _ = self.embed
        second, _, third, _, last = self.score
        return norm, first, second, third, last


# Types of the parts of a `QuadPredictor` at all depths, in order
PREDICTOR_PARTS = (
    *(nn.Sequential, LayerNorm, nn.Linear, nn.GELU),
    *(nn.Sequential, nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear),
)


def quadrant_logits(score: Tensor, maps: QuadMaps) -> Tensor:
    """Mean score (b, 4) of each quadrant (paper Eq. 8) from the scores (b, h, w) of the tokens.

    A quadrant without tokens (a side of length 1) gets -inf, so that it is never selected.
    """
    return mean_scores(score, maps.pool, maps.count)


def select_quadrant(logits: Tensor, tau: float, training: bool, gumbel: bool = True) -> Tensor:
    """One-hot choice (b, 4) from logits (b, 4) (paper Eq. 9).

    Training: a straight-through Gumbel-softmax sample at temperature `tau`, from torch's global
    generator: exactly one-hot, with the gradient of the soft sample. Without `gumbel` the same
    without noise. Otherwise: argmax, without noise.
    """
    noise = draw_noise(logits, logits.dtype) if training and gumbel else None
    hard, soft = choose(logits, noise, tau)
    return straight_through(hard, soft) if training else hard


def choose_quadrant(
    score: Tensor, maps: QuadMaps, tau: float, training: bool, gumbel: bool = True
) -> Tensor:
    """`select_quadrant` of the `quadrant_logits`; on a GPU in one pass, with the same draws."""
    if not is_fused(score):
        return select_quadrant(quadrant_logits(score, maps), tau, training, gumbel)
    score = score if training else score.detach()
    noise = draw_noise(score, score.dtype) if training and gumbel else None
    return quadrant_choice(score, maps.pool, maps.count, noise, tau)


def draw_noise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A draw (b, 4) of the exponential distribution for b images x, from torch's global generator.

    Its negative logarithm is Gumbel noise.
    """
    return x.new_empty((len(x), 4), dtype=dtype).exponential_()


def first_quadrant(batch: int, device: torch.device) -> Tensor:
    """One-hot (b, 4): the top left quadrant of every image."""
    return torch.eye(4, device=device)[:1].repeat(batch, 1)


def random_quadrant(batch: int, device: torch.device, seed: int, training: bool) -> Tensor:
    """One-hot (b, 4), each quadrant with equal probability, whatever the image.

    Training: from torch's global generator. Otherwise from `seed`, so that image i of a batch gets
    the same quadrant each time.
    """
    if training:
        choice = torch.randint(4, (batch,), device=device)
    else:
        generator = torch.Generator().manual_seed(seed)
        choice = torch.randint(4, (batch,), generator=generator).to(device)
    return torch.eye(4, device=device)[choice]
