"""The fused Triton kernels in Triton's interpreter, on the CPU, against their references."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import passed
from test_fused import (
    add_case,
    bias_norm_case,
    call_predictor,
    dwconv_case,
    gradients,
    mlp_case,
    predictor_case,
    relative,
    scaled_case,
)
from test_patch_norm import gradients as patch_gradients
from test_patch_norm import make_grad, patch_case

from quadmamba.kernels.fused import (
    add_layer_norm_ref,
    bias_norm_ref,
    dwconv_silu_ref,
    layer_norm_ref,
    mlp_ref,
    patch_norm_ref,
    predictor_score_ref,
    scaled_add_ref,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, below")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain_gradients(ref, inputs, *grads):
    return tuple(gradients(ref, inputs, grads).values())


@interpreted
@pytest.mark.usefixtures("_range")
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 3), (1, 17, 9, 36), (1, 29, 5, 64), (2, 57, 3, 130)], ids=str
)
def test_interpreted_dwconv_silu(shape):
    from quadmamba.kernels.fused.dwconv_silu import triton as kernels

    inputs, grad = dwconv_case(shape), torch.randn(shape)
    truth = plain_gradients(dwconv_silu_ref, inputs, grad)
    found = (kernels.forward(**inputs), *kernels.backward(grad, **inputs))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 9, 192)], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_interpreted_layer_norm(shape, scaled):
    from quadmamba.kernels.fused.layer_norm import triton as kernels

    inputs, (grad, grad_total) = add_case(shape, scaled), torch.randn(2, *shape)
    params = (inputs["weight"], inputs["bias"], 1e-5, torch.float32)
    scale = inputs.get("scale")
    truth = plain_gradients(add_layer_norm_ref, inputs, grad_total, grad)
    found = kernels.forward(inputs["x"], *params, inputs["residual"], scale)
    *grads, sums = kernels.backward(grad, found[0], *params[::2], torch.float32, grad_total, scale)
    found = *found, *grads, *sums
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    del inputs["residual"], inputs["x"]
    x = truth[0].detach()
    inputs = {"x": x, "weight": params[0], "bias": params[1]}
    truth = plain_gradients(layer_norm_ref, inputs, grad)
    _, grad_x, sums = kernels.backward(grad, x, *params[::2], x.dtype)
    found = kernels.forward(x, *params)[1], grad_x, *sums
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 9, 192)], ids=str)
@pytest.mark.parametrize("gelu", [True, False])
def test_interpreted_bias_norm(shape, gelu, monkeypatch):
    from quadmamba.kernels.fused.bias_norm import triton as kernels

    monkeypatch.setattr(kernels, "MAX_PARTIALS", 2)  # several tiles in a program
    monkeypatch.setattr(kernels, "_launch", kernels._launch.__wrapped__)
    inputs, grad = bias_norm_case(shape), torch.randn(shape)
    truth = plain_gradients(partial(bias_norm_ref, gelu=gelu), inputs, grad)
    found = kernels.forward(*inputs.values(), gelu, 1e-5, torch.float32)
    grad_x, sums = kernels.backward(grad, *inputs.values(), gelu, 1e-5)
    torch.testing.assert_close((found, grad_x, *sums), truth, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 9, 33)], ids=str)
def test_interpreted_scaled_add(shape, monkeypatch):
    from quadmamba.kernels.fused.scaled_add import triton as kernels

    monkeypatch.setattr(kernels, "BLOCK", 32)  # several programs for a sample
    monkeypatch.setattr(kernels, "_launch", kernels._launch.__wrapped__)
    inputs, grad = scaled_case(shape), torch.randn(shape)
    truth = plain_gradients(scaled_add_ref, inputs, grad)
    residual, x, scale = inputs.values()
    calls = (x, scale, residual), (grad, scale, None)
    out, grad_x = (kernels.scaled(*call, x.dtype) for call in calls)
    found = out, grad, grad_x
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    mixed = kernels.scaled(x.half(), scale, residual, torch.float32)
    torch.testing.assert_close(mixed, scaled_add_ref(residual, x.half(), scale), rtol=0, atol=1e-6)


@pytest.fixture
def _range(monkeypatch):
    """Loops to a number known at run time: NumPy 2.4 makes no integer of an array of one number."""
    from triton.runtime import interpreter

    def ends(*bounds):
        return range(*(b.handle.data.item() if hasattr(b, "handle") else b for b in bounds))

    monkeypatch.setattr(interpreter, "range", ends, raising=False)


@interpreted
@pytest.mark.parametrize("shape", [(37, 7), (3, 19, 72), (0, 8)], ids=str)
def test_interpreted_mlp(shape, monkeypatch):
    from quadmamba.kernels.fused.mlp import ops, triton

    monkeypatch.setattr(triton, "PROGRAMS", 2)  # several tiles in a program
    inputs, grad = mlp_case(shape), torch.randn(*shape[:-1], shape[-1] + 1)
    truth = plain_gradients(mlp_ref, inputs, grad)
    x, *params = inputs.values()
    y, hidden = ops._mlp.kernels["cuda"](x, *params, *params)
    found = (y, *ops._mlp_backward.kernels["cuda"](grad, x, hidden, *params[::2], torch.float32))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("_range")
@pytest.mark.parametrize("widest", [256, 8], ids=["chain", "layers"])
@pytest.mark.parametrize(("rows", "d"), [(40, 16), (70, 24), (130, 96), (3, 7)])
def test_interpreted_predictor(rows, d, widest, monkeypatch):
    from quadmamba.kernels.fused.predictor import host as kernels
    from quadmamba.kernels.fused.predictor import launches

    monkeypatch.setattr(launches, "CHAIN_MAX_D", widest)
    if widest < d:  # as the widest tokens
        monkeypatch.setattr(launches, "WEIGHT_GRAD", ())
        monkeypatch.setattr(launches, "WIDER_ROWS", 64)
    monkeypatch.setattr(launches, "end", launches.end.__wrapped__)
    inputs, grad = predictor_case((rows, d)), torch.randn(rows)
    x, *params = inputs.values()
    truth = plain_gradients(partial(call_predictor, predictor_score_ref), inputs, grad)
    score, kept = kernels.forward(x, params, 1e-5, True)
    grad_x, grads = kernels.backward(grad, x, kept, params)
    for value, expected in zip((score, grad_x, *grads), truth):
        assert relative(value, expected.double()) < 2e-4
    total = torch.randn(rows, d)
    expected = total + grad_x
    added, again = kernels.backward(grad, x, kept, params, total)
    assert added is total
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, other) for value, other in zip(again, grads))
    alone, nothing = kernels.forward(x, params, 1e-5, False)
    assert torch.equal(alone, score)
    assert nothing == []


def fenced(x):
    """The numbers of x with NaN before and after them in memory."""
    fence = x.new_full((4096,), torch.nan)
    return torch.cat([fence, x.flatten(), fence])[4096:-4096].view(x.shape)


@interpreted
@pytest.mark.usefixtures("_range")
@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("programs", [2, 64], ids=["tiles", "programs"])
@pytest.mark.parametrize("case", [(3, 17, 22, 3, 48), (3, 6, 37, 1, 8), (1, 1, 1, 4, 24)], ids=str)
def test_interpreted_patch_norm(case, programs, monkeypatch):
    from quadmamba.kernels.fused.patch_norm import triton as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "GRAD_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "_launch", kernels._launch.__wrapped__)
    inputs, half = {k: fenced(v) for k, v in patch_case(*case).items()}, torch.float16
    grad = fenced(make_grad(inputs).to(half))
    double = {k: (v.to(half) if k in ("x", "weight") else v).double() for k, v in inputs.items()}
    truth = patch_gradients(patch_norm_ref, double, grad)
    out = kernels.forward(*inputs.values(), 1e-5, half)
    sums = kernels.backward(grad, *inputs.values(), 1e-5)
    grads = sums.split([p.numel() for p in list(inputs.values())[1:]])
    for value, (key, expected) in zip((out, *grads), truth.items()):
        assert relative(value.view_as(expected), expected) < 5e-4, key
    sums = kernels.backward(grad, *inputs.values(), 0.0)
    assert torch.isfinite(sums).all(), "pixels beyond the result have no deviation"


CHOSEN = "interpreted and not test_triton_interpreter"  # which would start itself


@pytest.mark.skipif(INTERPRETED, reason="would start itself")
def test_triton_interpreter():
    """The Triton kernels on the CPU, in a process of its own: the switch is read at import."""
    pytest.importorskip("triton")
    others = ("test_quadrant_choice.py", "test_nodes.py")
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", CHOSEN]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert passed(done) >= 43
