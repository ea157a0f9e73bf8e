"""The choice of one quadrant an image from the scores of its tokens, in one pass."""

from quadmamba.kernels.fused.quadrant_choice.ops import quadrant_choice
from quadmamba.kernels.fused.quadrant_choice.reference import quadrant_choice_ref

__all__ = ["quadrant_choice", "quadrant_choice_ref"]
