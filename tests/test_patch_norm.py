"""The stem's first convolution with its norm and GELU: numbers, graphs, compilation, messages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_fused import DEVICES, EPS, needs_gpu, relative
from torch.utils.flop_counter import FlopCounterMode

from quadmamba.kernels.fused import patch_norm, patch_norm_ref, takes_patch_norm
from quadmamba.kernels.fused.patch_norm import ops
from quadmamba.models import layers

HALVES = (torch.float16, torch.bfloat16)
CASES = {  # b, H, W, c_in, c
    "rgb": (2, 17, 22, 3, 48),
    "one-channel": (2, 17, 22, 1, 8),
    "four-channels": (3, 8, 9, 4, 24),
    "pixel": (1, 1, 1, 3, 48),
    "column": (2, 70, 1, 1, 24),
    "row": (1, 2, 67, 4, 8),
}
GPU_CASES = {**CASES, "image": (3, 224, 224, 3, 48), "widest": (2, 20, 9, 7, 256)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def patch_case(b, h, w, c_in, c):
    return {
        "x": torch.randn(b, h, w, c_in),
        "weight": 0.5 * torch.randn(c, c_in, 3, 3),
        "bias": torch.randn(c),
        "gain": torch.randn(c),
        "shift": torch.randn(c),
    }


def make(case, device, dtype=torch.float32):
    """Images of dtype, float32 parameters."""
    inputs = {k: v.to(device) for k, v in patch_case(*case).items()}
    return {**inputs, "x": inputs["x"].to(dtype)}


def plain(x, weight, bias, gain, shift):
    """The parts, each in the dtype of x as autocast has it: float32 inside the norm."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype), 2, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = y.permute(0, 2, 3, 1).to(wide)
    y = F.layer_norm(y, gain.shape, gain.to(wide), shift.to(wide)).to(x.dtype)
    return F.gelu(y)


def gradients(op, inputs, grad):
    """Result and gradients of the parameters, by name; the images are constants."""
    inputs = {k: v.detach().clone().requires_grad_(k != "x") for k, v in inputs.items()}
    out = op(**inputs)
    params = {k: v for k, v in inputs.items() if k != "x"}
    found = torch.autograd.grad(out, list(params.values()), grad.to(out))
    return {"out": out.detach()} | {f"d{k}": g for k, g in zip(params, found)}


def make_grad(inputs):
    (b, h, w, _), c = inputs["x"].shape, inputs["weight"].shape[0]
    return torch.randn(b, (h + 1) // 2, (w + 1) // 2, c, device=inputs["x"].device)


def compare(case, dtype, device, draws):
    """Errors against float64 beside those of the parts, over a few draws."""
    runs = []
    for _ in range(draws):
        inputs = make(case, device, dtype)
        grad = make_grad(inputs).to(dtype)
        double = {k: v.double() for k, v in inputs.items()}
        calls = (patch_norm, inputs), (plain, inputs), (plain, double)
        runs.append([gradients(op, values, grad) for op, values in calls])
        assert runs[-1][0]["out"].dtype == dtype
        assert all(runs[-1][0][f"d{k}"].dtype == v.dtype for k, v in inputs.items() if k != "x")
    for key in runs[0][0]:
        ours, parts, truth = (
            torch.cat([run[i][key].double().flatten() for run in runs]) for i in range(3)
        )
        assert relative(ours, truth) <= 2 * relative(parts, truth) + EPS[dtype], key


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_on_cpu(case):
    compare(case, torch.float32, "cpu", 4)


@needs_gpu
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernel(case, dtype):
    compare(case, dtype, "cuda", 32 if case[1] < 224 else 1)


def test_gradients_add_up_and_change_in_place():
    inputs = make(CASES["rgb"], "cpu")
    params = [v.requires_grad_() for k, v in inputs.items() if k != "x"]
    for _ in range(2):
        patch_norm(**inputs).sum().backward()
    total = [p.grad.clone() for p in params]
    torch.optim.SGD(params, lr=0.0).zero_grad(set_to_none=False)
    patch_norm(**inputs).sum().backward()
    torch.nn.utils.clip_grad_norm_(params, 1e9)
    assert all(torch.equal(2 * p.grad, both) for p, both in zip(params, total))


def test_gradcheck():
    x, *params = (v.double() for v in patch_case(2, 5, 4, 2, 3).values())
    params = [p.requires_grad_() for p in params]
    for op in (patch_norm, patch_norm_ref):
        assert torch.autograd.gradcheck(partial(op, x), params)


@pytest.mark.parametrize("device", DEVICES)
def test_runs_are_bit_equal(device):
    inputs = make((4, 30, 41, 3, 48), device, torch.bfloat16)
    grad = make_grad(inputs)
    first, second = (gradients(patch_norm, inputs, grad) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@needs_gpu
def test_kernel_in_a_cuda_graph():
    inputs = make((2, 9, 20, 3, 48), "cuda", torch.float16)
    grad = make_grad(inputs)
    gradients(patch_norm, inputs, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(patch_norm, inputs, grad)
    inputs["x"].copy_(torch.randn_like(inputs["x"]))
    graph.replay()
    truth = gradients(patch_norm, inputs, grad)
    assert all(torch.equal(found[key], truth[key]) for key in truth)


@needs_gpu
def test_kernel_beyond_32_bit_offsets():
    """The last image of 2.2e9 numbers, and of a result of 2.2e9, gives what it gives alone."""
    for shape in ((120, 2500, 2500, 3, 8), (300, 784, 784, 1, 48)):
        inputs = make((1, *shape[1:]), "cuda", torch.float16)
        last, alone = inputs["x"], patch_norm(**inputs)
        inputs["x"] = torch.zeros(shape[0], *last.shape[1:], dtype=last.dtype, device="cuda")
        inputs["x"][-1:] = last
        assert torch.equal(patch_norm(**inputs)[-1:], alone)


@pytest.mark.parametrize("device", DEVICES)
def test_sliced_and_empty_inputs(device):
    inputs = make((4, 12, 11, 4, 24), device, torch.float16)
    view = inputs["x"][::2, 1:, :-1, 1:]
    inputs["weight"] = inputs["weight"][:, 1:]
    grad = make_grad({**inputs, "x": view})
    found = gradients(patch_norm, {**inputs, "x": view}, grad)
    truth = gradients(patch_norm, {**inputs, "x": view.contiguous()}, grad)
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    planes = {**inputs, "x": view.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)}
    assert torch.equal(patch_norm(**planes), truth["out"]), "images that come as planes"
    empty = gradients(patch_norm, {**inputs, "x": view[:0]}, grad[:0])
    assert empty["out"].shape == (0, 6, 5, 24)
    assert all(not value.any() for value in empty.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_chooses_the_dtype(device, dtype):
    inputs = make((2, 9, 20, 3, 48), device)
    grad = make_grad(inputs)
    with torch.autocast(device, dtype):
        found = gradients(patch_norm, inputs, grad)
    rounded = {**inputs, "x": inputs["x"].to(dtype)}
    truth = gradients(patch_norm, rounded, grad)
    assert found["out"].dtype == dtype
    assert all(torch.equal(found[key], truth[key]) for key in truth)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_equals_eager(device):
    inputs = make((2, 5, 6, 3, 16), device, torch.float16)
    grad = make_grad(inputs)
    compiled = torch.compile(patch_norm, fullgraph=True, backend="aot_eager")
    eager, traced = (gradients(op, inputs, grad) for op in (patch_norm, compiled))
    assert all(torch.equal(eager[key], traced[key]) for key in eager)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    inputs = make((2, 3, 4, 3, 8), device, torch.float16)
    tensors = [v.requires_grad_(k != "x") for k, v in inputs.items()]
    op = torch.ops.quadmamba.patch_norm.default
    torch.library.opcheck(op, (*tensors, 1e-5, torch.float16))


def test_only_the_arguments_are_kept_and_the_products_counted():
    x, *params = patch_case(2, 6, 5, 3, 8).values()
    params, saved = [p.requires_grad_() for p in params], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        patch_norm(x, *params)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, *params)}
    with FlopCounterMode(display=False) as counter:
        patch_norm(x, *params).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 3) * 27 * 8


LIMITS = {  # images, channels out, compute dtype, message
    "single": ((1, 4, 4, 3), 8, torch.float32, "float16 or bfloat16 on CUDA, got torch.float32"),
    "double": ((1, 4, 4, 3), 8, torch.float64, "float16 or bfloat16 on CUDA, got torch.float64"),
    "patch": ((1, 4, 4, 8), 8, torch.float16, "at most 7 channels in and 256 out on CUDA, got 8"),
    "wide": ((1, 4, 4, 3), 257, torch.float16, "got 3 and 257"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_on_cuda_are_said(name):
    shape, c, dtype, message = LIMITS[name]
    tensors = patch_case(*shape, c).values()
    with pytest.raises(ValueError, match=message):
        ops._patch_norm.kernels["cuda"](*tensors, 1e-5, dtype)
    grad = torch.zeros(1, 2, 2, c, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        ops._patch_norm_backward.kernels["cuda"](grad, *tensors, 1e-5)


def test_images_that_require_a_gradient_are_refused():
    x, *params = patch_case(1, 3, 3, 3, 8).values()
    x.requires_grad_()
    with pytest.raises(ValueError, match="require no gradient"):
        patch_norm(x, *params)
    with torch.no_grad():
        assert torch.equal(patch_norm(x, *params), patch_norm(x.detach(), *params))


@needs_gpu
def test_what_the_kernel_takes():
    x, weight = torch.zeros(1, 4, 4, 3, device="cuda"), torch.zeros(8, 3, 3, 3, device="cuda")
    assert takes_patch_norm(x.half(), weight)
    assert not takes_patch_norm(x, weight)
    with torch.autocast("cuda", torch.bfloat16):
        assert takes_patch_norm(x, weight)
        assert not takes_patch_norm(x.double(), weight)
        assert not takes_patch_norm(x, weight.double())
        assert not takes_patch_norm(x, weight[..., :2])
        assert not takes_patch_norm(x.clone().requires_grad_(), weight)
        assert not takes_patch_norm(x.cpu(), weight.cpu())
        assert not takes_patch_norm(x.new_zeros(1, 4, 4, 8), weight.new_zeros(8, 8, 3, 3))
        assert not takes_patch_norm(x, weight.new_zeros(257, 3, 3, 3))


@pytest.fixture
def taken(monkeypatch, device):
    """Images that the model gave to the op; a CPU takes the paths of a GPU."""
    seen = []
    inner = layers.patch_norm
    monkeypatch.setattr(layers, "patch_norm", lambda x, *args: seen.append(x) or inner(x, *args))
    if device == "cpu":
        monkeypatch.setattr(layers, "is_fused", lambda _: True)
        monkeypatch.setattr(layers, "takes_patch_norm", lambda x, _: not x.requires_grad)
    return seen


def run_stem(stem, x):
    """Result and gradients, on a GPU in autocast."""
    with torch.autocast("cuda", torch.float16, enabled=x.is_cuda):
        y = stem(x)
    torch.manual_seed(1)
    wanted = [*stem.parameters(), *([x] if x.requires_grad else [])]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.randn_like(y))]


@pytest.mark.parametrize("device", DEVICES)
def test_stem_equals_its_parts(device, taken):
    stem, x = layers.Stem(3, 96).to(device), torch.randn(2, 3, 33, 46, device=device)
    found = run_stem(stem, x)
    assert len(taken) == 1
    hook = stem[1].register_forward_hook(lambda *_: None)
    truth = run_stem(stem, x)
    assert len(taken) == 1, "parts that somebody watches run by themselves"
    hook.remove()
    for value, other in zip(found, truth):
        assert relative(value, other.double()) < (5e-3 if device == "cuda" else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_that_requires_a_gradient_gets_one(device, taken):
    stem, x = layers.Stem(3, 96).to(device), torch.randn(2, 3, 33, 46, device=device)
    grad_x = run_stem(stem, x.requires_grad_())[-1]
    assert not taken
    assert grad_x.shape == x.shape
    assert grad_x.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "change",
    [{"stride": 1}, {"padding": 2}, {"padding": 2, "dilation": 2}, {"padding_mode": "reflect"}],
    ids=str,
)
def test_a_first_convolution_of_another_kind_is_no_patch(device, change, taken):
    stem, x = layers.Stem(3, 96).to(device), torch.randn(2, 3, 17, 22, device=device)
    stem[0] = layers.GridConv2d(3, 48, 3, **{"stride": 2, "padding": 1, **change}).to(device)
    found = run_stem(stem, x)
    assert not taken
    stem[1].register_forward_hook(lambda *_: None)
    for value, other in zip(found, run_stem(stem, x)):
        assert relative(value, other.double()) < (5e-3 if device == "cuda" else 1e-5)
