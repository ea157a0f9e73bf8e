"""The choice of one quadrant an image from the scores of its tokens, in one pass."""

from quadmamba.kernels.fused.quadrant_choice.ops import quadrant_choice
from quadmamba.kernels.fused.quadrant_choice.reference import (
    choose,
    mean_scores,
    quadrant_choice_ref,
    straight_through,
)

__all__ = ["choose", "mean_scores", "quadrant_choice", "quadrant_choice_ref", "straight_through"]
