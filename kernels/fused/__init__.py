"""Fused Triton ops around the scan; each is the PyTorch reference for CPU tensors."""

from quadmamba.kernels.fused.bias_norm import bias_norm, bias_norm_ref
from quadmamba.kernels.fused.casts import cast_together
from quadmamba.kernels.fused.dwconv_silu import dwconv_silu, dwconv_silu_ref
from quadmamba.kernels.fused.layer_norm import (
    add_layer_norm,
    add_layer_norm_ref,
    layer_norm,
    layer_norm_ref,
)
from quadmamba.kernels.fused.linear import linear
from quadmamba.kernels.fused.mlp import mlp, mlp_ref
from quadmamba.kernels.fused.patch_norm import patch_norm, patch_norm_ref, takes_patch_norm
from quadmamba.kernels.fused.predictor import predictor_score, predictor_score_ref
from quadmamba.kernels.fused.quadrant_choice import quadrant_choice, quadrant_choice_ref
from quadmamba.kernels.fused.scaled_add import scaled_add, scaled_add_ref

__all__ = [
    "add_layer_norm",
    "add_layer_norm_ref",
    "bias_norm",
    "bias_norm_ref",
    "cast_together",
    "dwconv_silu",
    "dwconv_silu_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "mlp",
    "mlp_ref",
    "patch_norm",
    "patch_norm_ref",
    "predictor_score",
    "predictor_score_ref",
    "quadrant_choice",
    "quadrant_choice_ref",
    "scaled_add",
    "scaled_add_ref",
    "takes_patch_norm",
]
