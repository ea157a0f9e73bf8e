"""What follows a convolution: its bias, LayerNorm, and GELU where one is wanted."""

from quadmamba.kernels.fused.bias_norm.ops import bias_norm
from quadmamba.kernels.fused.bias_norm.reference import bias_norm_ref

__all__ = ["bias_norm", "bias_norm_ref"]
