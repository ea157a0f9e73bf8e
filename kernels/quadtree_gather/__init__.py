"""Quadtree gather: tokens to the quadtree sequence and back, with the gradient of the decision."""

from quadmamba.kernels.quadtree_gather.ops import (
    decision_grad,
    gather_in,
    gather_out,
    invert_maps,
)
from quadmamba.kernels.quadtree_gather.reference import (
    decision_grad_ref,
    gather_in_ref,
    gather_out_ref,
)

__all__ = [
    "decision_grad",
    "decision_grad_ref",
    "gather_in",
    "gather_in_ref",
    "gather_out",
    "gather_out_ref",
    "invert_maps",
]
