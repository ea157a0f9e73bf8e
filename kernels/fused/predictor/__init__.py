"""The quadtree predictor's chain: the score of each token."""

from quadmamba.kernels.fused.predictor.ops import predictor_score
from quadmamba.kernels.fused.predictor.reference import predictor_score_ref

__all__ = ["predictor_score", "predictor_score_ref"]
