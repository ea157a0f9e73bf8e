"""Depthwise 3x3 convolution and SiLU in one pass, channels last."""

from quadmamba.kernels.fused.dwconv_silu.ops import dwconv_silu
from quadmamba.kernels.fused.dwconv_silu.reference import dwconv_silu_ref

__all__ = ["dwconv_silu", "dwconv_silu_ref"]
