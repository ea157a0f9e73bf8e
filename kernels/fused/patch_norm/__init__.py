"""The first convolution of images with all that follows it: 3x3 of stride 2, LayerNorm, GELU."""

from quadmamba.kernels.fused.patch_norm.ops import patch_norm, takes_patch_norm
from quadmamba.kernels.fused.patch_norm.reference import patch_norm_ref

__all__ = ["patch_norm", "patch_norm_ref", "takes_patch_norm"]
