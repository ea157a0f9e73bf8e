"""Fused ops: wrong arguments, and a missing Triton, say what was expected."""

from __future__ import annotations

import sys

import pytest
import torch
from test_fused import predictor_params

from quadmamba.kernels.fused import (
    add_layer_norm,
    bias_norm,
    dwconv_silu,
    layer_norm,
    linear,
    mlp,
    patch_norm,
    predictor_score,
    scaled_add,
)


def zeros(*shapes):
    return [torch.zeros(shape) for shape in shapes]


ERRORS = {  # call, arguments, message
    "dwconv_x": (dwconv_silu, zeros((3, 4, 8), (8, 1, 3, 3)), "floating x"),
    "dwconv_weight": (dwconv_silu, zeros((1, 3, 4, 8), (8, 3, 3)), "expected weight"),
    "bias_norm_x": (bias_norm, zeros((), 8, 8, 8), "floating x"),
    "bias_norm_shift": (bias_norm, zeros((3, 8), 8, 8, 7), "expected shift of shape"),
    "bias_norm_dtypes": (
        bias_norm,
        (torch.zeros(3, 8), torch.zeros(8).half(), *zeros(8, 8)),
        "of one dtype, got bias",
    ),
    "patch_x": (patch_norm, zeros((4, 4, 3), (8, 3, 3, 3), 8, 8, 8), "floating x"),
    "patch_pixels": (patch_norm, zeros((1, 0, 4, 3), (8, 3, 3, 3), 8, 8, 8), "a pixel or more"),
    "patch_weight": (patch_norm, zeros((1, 4, 4, 3), (8, 4, 3, 3), 8, 8, 8), "got weight"),
    "patch_scalar": (patch_norm, zeros((1, 4, 4, 3), (), 8, 8, 8), "got weight"),
    "patch_gain": (patch_norm, zeros((1, 4, 4, 3), (8, 3, 3, 3), 8, 7, 8), "got gain .7,."),
    "patch_dtypes": (
        patch_norm,
        (*zeros((1, 4, 4, 3), (8, 3, 3, 3), 8, 8), torch.zeros(8).half()),
        "of one dtype, got shift",
    ),
    "norm_weight": (layer_norm, zeros((3, 8), 4, 8), "expected weight"),
    "add_shapes": (add_layer_norm, zeros((3, 8), (2, 8), 8, 8), "one shape"),
    "add_scale": (add_layer_norm, zeros((3, 8), (3, 8), 8, 8, 2), "expected scale"),
    "scaled_shapes": (scaled_add, zeros((3, 8), (2, 8), 3), "one shape"),
    "scaled_residual": (
        scaled_add,
        (torch.zeros(3, 8, dtype=torch.int64), *zeros((3, 8), 3)),
        "floating residual",
    ),
    "scaled_scale": (scaled_add, zeros((3, 8), (3, 8), 2), "expected scale of shape"),
    "linear_weight": (linear, zeros((3, 8), (4, 7)), "expected floating x"),
    "mlp_x": (mlp, zeros((), (8, 4), 8, (4, 8), 4), "floating x"),
    "mlp_weight1": (mlp, zeros((3, 5), (8, 4), 8, (4, 8), 4), "weight1 of shape"),
    "linear_dtype": (
        linear,
        (torch.zeros(3, 8), torch.ones(4, 8, dtype=torch.int64)),
        "expected floating x",
    ),
    "mlp_bias1": (mlp, zeros((3, 4), (8, 4), (), (4, 8), 4), "expected biases"),
    "mlp_dtypes": (
        mlp,
        (torch.zeros(3, 4), torch.zeros(8, 4).half(), *zeros(8, (4, 8), 4)),
        "parameters of one dtype",
    ),
    "mlp_bias2": (mlp, zeros((3, 4), (8, 4), 8, (4, 8), 5), "weight2 of shape"),
    "predictor_count": (
        predictor_score,
        (torch.zeros(2, 8), predictor_params(8)[:-1]),
        "10 params",
    ),
    "predictor_width": (predictor_score, (torch.zeros(2, 12), predictor_params(8)), "params.0."),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected(name):
    call, arguments, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call(*arguments)


def test_a_second_derivative_of_the_mlp_is_refused():
    params = [p.requires_grad_() for p in zeros((8, 4), 8, (4, 8), 4)]
    y = mlp(torch.ones(3, 4), *params)
    (grad,) = torch.autograd.grad(y.sum(), params[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        (y.sum() + grad.square().sum()).backward()


def test_missing_triton_is_loud(monkeypatch):
    from quadmamba.kernels.fused.launch import triton_kernels

    monkeypatch.setitem(sys.modules, "triton", None)
    triton_kernels.cache_clear()
    with pytest.raises(RuntimeError, match="pip install triton"):
        triton_kernels("quadmamba.kernels.fused.layer_norm")
