"""A residual sum with a factor for each sample."""

from quadmamba.kernels.fused.scaled_add.ops import scaled_add
from quadmamba.kernels.fused.scaled_add.reference import scaled_add_ref

__all__ = ["scaled_add", "scaled_add_ref"]
