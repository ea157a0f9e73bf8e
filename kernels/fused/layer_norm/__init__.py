"""LayerNorm over the last dimension, alone or behind a residual sum."""

from quadmamba.kernels.fused.layer_norm.ops import add_layer_norm, layer_norm
from quadmamba.kernels.fused.layer_norm.reference import add_layer_norm_ref, layer_norm_ref

__all__ = ["add_layer_norm", "add_layer_norm_ref", "layer_norm", "layer_norm_ref"]
