"""Fused ops: forward and all gradients against float64, beside plain torch in the same dtype."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from quadmamba.kernels.fused import (
    add_layer_norm,
    add_layer_norm_ref,
    bias_norm,
    bias_norm_ref,
    cast_together,
    dwconv_silu,
    dwconv_silu_ref,
    layer_norm,
    layer_norm_ref,
    linear,
    mlp,
    mlp_ref,
    predictor_score,
    predictor_score_ref,
    scaled_add,
    scaled_add_ref,
)
from quadmamba.kernels.fused.casts import cast

# Half a unit in the last place of the dtype; float32: a few, for sums in another order.
EPS = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def predictor_params(d: int) -> list[torch.Tensor]:
    sides = [d, d, d // 2, d // 4, 2]
    params = [torch.rand(d) + 0.5, 0.1 * torch.randn(d)]
    for fan_in, fan_out in zip(sides, sides[1:]):
        params += [2 * fan_in**-0.5 * torch.randn(fan_out, fan_in), 0.1 * torch.randn(fan_out)]
    return params


def dwconv_case(shape):
    return {"x": torch.randn(shape), "weight": 0.3 * torch.randn(shape[-1], 1, 3, 3)}


def norm_case(shape):
    d = shape[-1]
    return {"x": 2 * torch.randn(shape) + 1, "weight": torch.randn(d), "bias": torch.randn(d)}


def add_case(shape, scaled=True):
    scale = {"scale": torch.arange(shape[0]) * 0.7} if scaled else {}
    return {"residual": torch.randn(shape), **norm_case(shape), **scale}


def bias_norm_case(shape):
    d = shape[-1]
    params = {name: torch.randn(d) for name in ("bias", "weight", "shift")}
    return {"x": 2 * torch.randn(shape) + 1, **params}


def scaled_case(shape):
    return {name: add_case(shape)[name] for name in ("residual", "x", "scale")}


def predictor_case(shape):
    params = {f"params{i}": p for i, p in enumerate(predictor_params(shape[-1]))}
    return {"x": torch.randn(shape), **params}


def mlp_case(shape):
    c, hidden = shape[-1], 2 * shape[-1] + 3
    return {
        "x": torch.randn(shape),
        "weight1": 3 * c**-0.5 * torch.randn(hidden, c),
        "bias1": torch.randn(hidden),
        "weight2": hidden**-0.5 * torch.randn(c + 1, hidden),
        "bias2": torch.randn(c + 1),
    }


def linear_case(shape):
    return {"x": torch.randn(shape), "weight": torch.randn(3, 5, shape[-1])}


def linear_ref(x, weight):
    y = torch.nn.functional.linear(x, weight.flatten(0, 1).to(x.dtype))
    return y.unflatten(-1, weight.shape[:2])


def call_predictor(op, x, **params):
    return op(x, list(params.values()))


OPS = {  # name: op, reference, inputs, arguments that stay float32 and constant
    "bias_norm": (bias_norm, bias_norm_ref, bias_norm_case),
    "bias_norm_gelu": (
        partial(bias_norm, gelu=True),
        partial(bias_norm_ref, gelu=True),
        bias_norm_case,
    ),
    "dwconv_silu": (dwconv_silu, dwconv_silu_ref, dwconv_case),
    "layer_norm": (layer_norm, layer_norm_ref, norm_case),
    "add_layer_norm": (add_layer_norm, add_layer_norm_ref, add_case),
    "add_layer_norm_unscaled": (
        add_layer_norm,
        add_layer_norm_ref,
        partial(add_case, scaled=False),
    ),
    "linear": (linear, linear_ref, linear_case),
    "mlp": (mlp, mlp_ref, mlp_case),
    "predictor_score": (
        partial(call_predictor, predictor_score),
        partial(call_predictor, predictor_score_ref),
        predictor_case,
    ),
    "scaled_add": (scaled_add, scaled_add_ref, scaled_case),
}
CASES = {"odd": (2, 5, 7, 12), "one": (1, 1, 1, 8), "d48": (2, 9, 3, 48)}
GPU_CASES = {
    **CASES,
    "stage1": (4, 56, 56, 192),
    "stage2": (2, 28, 28, 384),
    "d64": (1, 17, 33, 64),
    "d96": (2, 9, 8, 96),
    "d100": (2, 8, 8, 100),
    "d128": (2, 8, 9, 128),
    "d256": (1, 9, 9, 256),
    "d512": (1, 7, 9, 512),
    "d768": (1, 14, 14, 768),
}
SOURCES = {"x", "residual"}  # half precision where the case says so; parameters stay float32


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    assert torch.isfinite(value).all()
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-12)).item()


def gradients(op, inputs, grads):
    """Outputs and gradients of all differentiable inputs, by name; `scale` is a constant."""
    inputs = {k: v.clone().requires_grad_(k != "scale") for k, v in inputs.items()}
    out = op(**inputs)
    out = out if isinstance(out, tuple) else (out,)
    wanted = {k: v for k, v in inputs.items() if k != "scale"}
    found = torch.autograd.grad(out, list(wanted.values()), [g.to(o) for g, o in zip(grads, out)])
    return {f"out{i}": o for i, o in enumerate(out)} | {f"d{k}": g for k, g in zip(wanted, found)}


def compare(name, shape, dtype, device):
    """Errors over enough draws that a lucky rounding of a few numbers does not set the bound."""
    draws = [
        compare_once(name, shape, dtype, device)
        for _ in range(32 if math.prod(shape) <= 1000 else 8 if math.prod(shape) <= 100000 else 1)
    ]
    for key in draws[0][0]:
        ours, plain, truth = (
            torch.cat([run[i][key].double().flatten() for run in draws]) for i in range(3)
        )
        bound = 2 * relative(plain, truth) + EPS[dtype]
        assert relative(ours, truth) <= bound, key


def compare_once(name, shape, dtype, device):
    op, ref, make = OPS[name]
    inputs = {k: v.to(device) for k, v in make(shape).items()}
    cast = {k: v.to(dtype) if k in SOURCES else v for k, v in inputs.items()}
    double = {k: v.double() for k, v in cast.items()}
    out = ref(**cast)
    grads = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]
    runs = [gradients(f, i, grads) for f, i in ((op, cast), (ref, cast), (ref, double))]
    assert all(value.dtype == runs[1][key].dtype for key, value in runs[0].items())
    return runs


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_on_cpu(name, case):
    compare(name, case, torch.float32, "cpu")


@needs_gpu
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_kernel(name, case, dtype):
    compare(name, case, dtype, "cuda")


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_kernel_is_bit_equal_and_follows_the_stream(name):
    op, ref, make = OPS[name]
    inputs = {k: v.cuda() for k, v in make((8, 14, 14, 96)).items()}
    inputs |= {k: v.half() for k, v in inputs.items() if k in SOURCES}
    out = ref(**inputs)
    grads = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]
    first = gradients(op, inputs, grads)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = gradients(op, inputs, grads)
    stream.synchronize()
    assert all(torch.equal(first[key], second[key]) for key in first)


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_kernel_in_a_cuda_graph(name):
    op, _, make = OPS[name]
    inputs = {k: v.cuda() for k, v in make((2, 6, 5, 32)).items()}
    inputs["x"] = inputs["x"].half()
    op(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(**inputs)
    inputs["x"].copy_(torch.randn_like(inputs["x"]))
    graph.replay()
    torch.testing.assert_close(out, op(**inputs), rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("name", ["dwconv_silu", "layer_norm", "predictor_score"])
def test_kernel_beyond_32_bit_offsets(name):
    """The last image of 2.3e9 elements gives what it gives alone."""
    op, _, make = OPS[name]
    inputs = {k: v.cuda() for k, v in make((1, 56, 56, 192)).items()}
    inputs["x"] = inputs["x"].half()
    alone = op(**inputs)
    last = inputs["x"]
    inputs["x"] = torch.zeros(3840, 56, 56, 192, dtype=torch.float16, device="cuda")
    inputs["x"][-1:] = last
    assert torch.equal(op(**inputs)[-1:], alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_compile_equals_eager(name, device):
    op, ref, make = OPS[name]
    inputs = {k: v.to(device) for k, v in make((2, 3, 4, 16)).items()}
    out = ref(**inputs)
    grads = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    eager, traced = (gradients(f, inputs, grads) for f in (op, compiled))
    assert all(torch.equal(eager[key], traced[key]) for key in eager)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    ops = torch.ops.quadmamba

    def tensors(case, shape=(2, 3, 2, 8)):
        return [v.to(device).requires_grad_(k != "scale") for k, v in case(shape).items()]

    residual, x, weight, bias, scale = tensors(add_case)
    torch.library.opcheck(ops.dwconv_silu.default, tensors(dwconv_case))
    args = (*tensors(bias_norm_case), True, 1e-5, torch.float32)
    torch.library.opcheck(ops.bias_norm.default, args)
    torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1e-5, torch.float32))
    torch.library.opcheck(ops.scaled_add.default, (residual, x, scale))
    args = (residual, x, weight, bias, scale, 1e-5, torch.float32)
    torch.library.opcheck(ops.add_layer_norm.default, args)
    x, *params = tensors(mlp_case)
    torch.library.opcheck(ops.mlp.default, (x, *params, *[p.detach() for p in params]))
    x, weight = tensors(linear_case)
    torch.library.opcheck(ops.linear.default, (x, weight, weight.detach()))
    tokens, *params = tensors(predictor_case)
    torch.library.opcheck(ops.predictor_score.default, (tokens, params, 1e-5, True))
    if device == "cuda":
        half = (tokens.detach().half().requires_grad_(), params, 1e-5, True)
        torch.library.opcheck(ops.predictor_score.default, half)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    op, ref, make = OPS[name]
    inputs = {k: v.double().requires_grad_(k != "scale") for k, v in make((1, 2, 2, 4)).items()}
    for f in (op, ref):
        assert torch.autograd.gradcheck(
            lambda *values, f=f: f(**dict(zip(inputs, values))), tuple(inputs.values())
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_sliced_and_empty_inputs(name, device):
    op, ref, make = OPS[name]
    inputs = {k: v.to(device) for k, v in make((4, 6, 5, 8)).items()}
    views = {k: v[::2, 1:, :-1] if k in SOURCES else v for k, v in inputs.items()}
    views |= {"scale": inputs["scale"][::2]} if "scale" in inputs else {}
    torch.testing.assert_close(op(**views), ref(**views), rtol=1e-4, atol=1e-4)
    empty = {k: v[:0] if k in SOURCES | {"scale"} else v for k, v in inputs.items()}
    out = op(**empty)
    found = gradients(op, empty, out if isinstance(out, tuple) else (out,))
    assert found["dx"].numel() == 0
    assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["bias_norm", "layer_norm", "add_layer_norm", "linear", "mlp", "predictor_score"]
)
def test_autocast_chooses_the_dtype(name, device):
    op, _, make = OPS[name]
    inputs = {k: v.to(device) for k, v in make((2, 3, 2, 16)).items()}
    with torch.autocast(device, torch.bfloat16):
        out = op(**inputs)
    if name == "predictor_score":
        assert out.dtype == torch.float32
        assert torch.equal(out, op(**{**inputs, "x": inputs["x"].bfloat16()}))
    else:
        normed = out[1] if name == "add_layer_norm" else out
        assert normed.dtype == torch.bfloat16
    if name == "add_layer_norm":
        assert out[0].dtype == torch.float32, "the residual stream keeps its dtype"


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_copies_of_a_whole_model_are_found_and_change_nothing(name):
    op, _, make = OPS[name]
    x, *params = (v.requires_grad_() for v in make((2, 3, 16)).values())
    with torch.autocast("cpu", torch.bfloat16):
        alone = op(x, *params)
        with cast_together(params, x):
            assert all(cast(p, torch.bfloat16) is cast(p, torch.bfloat16) for p in params)
            together = op(x, *params)
            with torch.no_grad():
                params[0].zero_()
            assert torch.equal(op(x, *params), alone), "the copy made at the begin counts"
        assert not torch.equal(op(x, *params), alone)
    assert torch.equal(together, alone)
    grads = torch.autograd.grad(together.float().sum(), params)
    assert all(grad.dtype == torch.float32 for grad in grads)
    with cast_together(params, x):
        assert cast(params[0], torch.float32).data_ptr() == params[0].data_ptr()
