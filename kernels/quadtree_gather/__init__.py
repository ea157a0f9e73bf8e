"""Quadtree gather: tokens to the quadtree sequence and back, with the gradient of the decision."""

from quadmamba.kernels.quadtree_gather.reference import gather_in_ref, gather_out_ref

__all__ = ["gather_in_ref", "gather_out_ref"]
