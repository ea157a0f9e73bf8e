"""Linear layer whose weight's gradient is a float32 sum."""

from quadmamba.kernels.fused.linear.ops import linear

__all__ = ["linear"]
