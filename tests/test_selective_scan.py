"""selective_scan against its float64 definition: output, last state and every gradient."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quadmamba.kernels import selective_scan as package

library = importlib.import_module(f"{package.__name__}.library")
ops = importlib.import_module(f"{package.__name__}.ops")
reference = importlib.import_module(f"{package.__name__}.reference")
scan, scan_ref = package.selective_scan, package.selective_scan_ref

# Beside twice the error of plain PyTorch in the same dtype: the rounding of sums in another order,
# and in 16-bit the special-function unit.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_build = pytest.mark.skipif(library.LOAD_ERROR is not None, reason="needs the built library")
DEVICES = [pytest.param("cpu", marks=needs_build), pytest.param("cuda", marks=needs_gpu)]

# b, d, l, n, groups
CASES = {
    "l1": (2, 6, 1, 2, 2),
    "l2": (2, 6, 2, 1, 1),
    "l7": (2, 4, 7, 16, 4),
    "l49": (3, 10, 49, 1, 2),
    "l128": (1, 33, 128, 2, 1),
    "l196": (2, 8, 196, 2, 4),
    "l257": (2, 17, 257, 1, 1),
    "l784": (1, 12, 784, 1, 2),
    "l3136": (1, 6, 3136, 1, 2),
    "l3137": (1, 4, 3137, 2, 1),
    "l20000": (1, 3, 20000, 1, 1),
    "n16": (2, 20, 150, 16, 2),
    "n64": (1, 5, 70, 64, 1),
    "n256": (1, 2, 20, 256, 2),
    "odd-d": (2, 37, 100, 1, 1),
    "group-of-one": (2, 5, 60, 2, 5),
    "many-rows": (3, 150, 264, 1, 1),
}


def make_inputs(shape, dtype, device, seed=0, share=1):
    b, d, l, n, g = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    inputs = {
        "u": normal(b, d, l).to(dtype),
        "delta": (normal(b, d // share, l) - 2).to(dtype),
        "A": -normal(d, n).exp(),
        "B": normal(b, g, n, l).to(dtype),
        "C": normal(b, g, n, l).to(dtype),
        "D": normal(d),
        "delta_bias": normal(d // share),
    }
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def run(function, inputs, options, wanted=("y", "last")):
    """Output, last state and the gradients of a fixed weighting of both, by name."""
    y, last = function(**inputs, return_last_state=True, **options)
    weight = {"y": 1.0 if "y" in wanted else 0.0, "last": 1.0 if "last" in wanted else 0.0}
    outputs, grads = [], []
    for name, out in (("y", y), ("last", last)):
        if weight[name]:
            wave = torch.linspace(0, 40, out.numel(), device=out.device, dtype=torch.float64)
            outputs.append(out)
            grads.append(wave.sin().view_as(out).to(out.dtype))
    leaves = {name: x for name, x in inputs.items() if x is not None}
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    named = {f"d{name}": grad for name, grad in zip(leaves, found) if grad is not None}
    return {"y": y.detach(), "last": last.detach(), **named}


def check(inputs, options, **more):
    """Kernel error at most twice that of plain PyTorch plus eps, both against float64."""
    dtype = inputs["u"].dtype
    chunked = {"chunked": inputs["u"].shape[2] > 300}
    double = {
        name: None if x is None else x.detach().double().requires_grad_()
        for name, x in inputs.items()
    }
    truth = run(scan_ref, double, {**options, **chunked}, **more)
    plain = run(scan_ref, inputs, {**options, **chunked}, **more)
    ours = run(scan, inputs, options, **more)
    for name, expected in truth.items():
        scale = expected.norm() + 1e-30
        error, allowed = (
            ((x[name].double() - expected).norm() / scale).item() for x in (ours, plain)
        )
        limit = 2 * allowed + TOLERANCES[dtype]
        assert error <= limit, f"{name}: error {error:.2e}, plain {allowed:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_matches_float64(shape, dtype, reverse, device):
    check(make_inputs(shape, dtype, device), {"delta_softplus": True, "reverse": reverse})


OPTIONS = {
    "no softplus": ({"delta_softplus": False}, ()),
    "no D": ({"delta_softplus": True}, ("D",)),
    "no bias": ({"delta_softplus": True, "reverse": True}, ("delta_bias",)),
    "bare": ({}, ("D", "delta_bias")),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("options", "without"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, without, dtype, device):
    inputs = make_inputs((2, 12, 300, 2, 2), dtype, device)
    if not options.get("delta_softplus"):
        inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
        inputs["delta_bias"] = inputs["delta_bias"].detach().abs().requires_grad_()
    for name in without:
        inputs[name] = None
    check(inputs, options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [("y",), ("last",)], ids=["y", "last"])
def test_gradient_of_one_output_alone(wanted, device):
    inputs = make_inputs((2, 8, 133, 2, 2), torch.float32, device)
    check(inputs, {"delta_softplus": True}, wanted=wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 257], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tail_of_a_chunk(length, dtype, device):
    """Unmasked, positions past the end have delta = softplus(bias): the last state would decay."""
    inputs = make_inputs((1, 9, length, 1, 1), dtype, device)
    inputs["delta_bias"] = torch.full_like(inputs["delta_bias"], 3.0).requires_grad_()
    check(inputs, {"delta_softplus": True}, wanted=("last",))


# The channels that share a row of delta: within a group of B and C, whole groups, or across them.
SHARES = {"two": (12, 2, 2), "group": (12, 6, 2), "all": (12, 12, 3), "across": (12, 3, 6)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "share", "g"), SHARES.values(), ids=SHARES.keys())
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_K2_channels_share_a_row_of_delta(d, share, g, dtype, reverse, device):
    """As if the rows stood there once per channel; their gradients are the sums over those."""
    inputs = make_inputs((2, d, 270, 2, g), dtype, device, share=share)
    options = {"delta_softplus": True, "reverse": reverse}
    ours = run(scan, inputs, options)
    repeated = {
        name: x.detach().double().repeat_interleave(share, x.dim() // 2)
        if name.startswith("delta")
        else x.detach().double()
        for name, x in inputs.items()
    }
    truth = run(scan_ref, {name: x.requires_grad_() for name, x in repeated.items()}, options)
    truth["ddelta"] = truth["ddelta"].unflatten(1, (-1, share)).sum(2)
    truth["ddelta_bias"] = truth["ddelta_bias"].unflatten(0, (-1, share)).sum(1)
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape, name
        error = (ours[name].double() - expected).norm() / expected.norm()
        assert error < (2e-6 if dtype == torch.float32 else 4e-3), name
    check(inputs, options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 128, 256, 300, 515], ids=str)
def test_K1_decay_and_state_after_every_chunk(length, dtype, device):
    inputs = make_inputs((2, 19, length, 3, 1), dtype, device)
    inputs = {name: x.detach() for name, x in inputs.items()}
    keep = {"keep_states": 2}
    values = [inputs[name] for name in NAMES]
    *_, pairs = torch.ops.selective_scan.selective_scan_fwd(*values, True, False, False, **keep)
    chunk = 128 if dtype == torch.float32 else 256
    ends = [min(start + chunk, length) for start in range(0, length, chunk)]
    assert pairs.shape == (2, 19, len(ends), 6)
    dt = torch.nn.functional.softplus(
        inputs["delta"].double() + inputs["delta_bias"].double()[:, None]
    )
    for i, end in enumerate(ends):
        decay = torch.exp(dt[:, :, :end].sum(2)[..., None] * inputs["A"].double())
        rows = ("u", "delta", "B", "C")
        part = {k: x.double()[..., :end] if k in rows else x.double() for k, x in inputs.items()}
        _, state = scan_ref(**part, delta_softplus=True, return_last_state=True)
        for found, expected in ((pairs[:, :, i, 0::2], decay), (pairs[:, :, i, 1::2], state)):
            assert (found.double() - expected).norm() <= 2e-5 * expected.norm()


def _layouts(x):
    b, d, l = x["u"].shape
    wide = torch.zeros(b, d, l + 3, dtype=x["u"].dtype, device=x["u"].device)
    both = torch.cat([x["B"], x["C"]], 2).detach()
    n = x["B"].shape[2]
    sliced = wide.clone()
    sliced[:, :, 1 : l + 1] = x["u"].detach()
    return {
        "transposed": {"u": x["u"].detach().transpose(1, 2).contiguous().transpose(1, 2)},
        "misaligned": {"u": sliced[:, :, 1 : l + 1]},
        "split": {"B": both[:, :, :n], "C": both[:, :, n:]},
        "expanded": {"delta": x["delta"].detach()[:, :1].expand(b, d, l)},
        "every other": {"A": x["A"].detach().repeat_interleave(2, 1)[:, ::2]},
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "misaligned", "split", "expanded", "every other"])
def test_layouts(layout, dtype, device):
    inputs = make_inputs((2, 8, 264, 2, 2), dtype, device)
    inputs.update(
        {name: x.requires_grad_() for name, x in _layouts(inputs)[layout].items()},
    )
    check(inputs, {"delta_softplus": True})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_decay_underflows(reverse, device):
    inputs = make_inputs((1, 4, 300, 2, 1), torch.float32, device)
    inputs["delta"] = torch.full_like(inputs["delta"], 90.0).requires_grad_()
    inputs["A"] = torch.full_like(inputs["A"], -20.0).requires_grad_()
    found = run(scan, inputs, {"delta_softplus": True, "reverse": reverse})
    assert all(torch.isfinite(x).all() for x in found.values())
    check(inputs, {"delta_softplus": True, "reverse": reverse})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 6, 20, 1, 2), (2, 6, 0, 1, 2)], ids=["batch", "length"])
def test_empty(shape, device):
    found = run(scan, make_inputs(shape, torch.float32, device), {"delta_softplus": True})
    b, d, l, n, _ = shape
    assert found["y"].shape == (b, d, l)
    assert torch.equal(found["last"].cpu(), torch.zeros(b, d, n))
    assert all(float(found[name].abs().sum()) == 0 for name in ("dD", "ddelta_bias"))


@pytest.mark.parametrize("device", DEVICES)
def test_out_dtype(device):
    inputs = make_inputs((2, 8, 264, 1, 2), torch.float16, device)
    options = {"delta_softplus": True, "out_dtype": torch.float32}
    assert scan(**inputs, **options).dtype == torch.float32
    assert scan(**inputs, delta_softplus=True).dtype == torch.float16
    check(inputs, options)


def test_three_dimensional_B_and_C():
    inputs = make_inputs((2, 8, 30, 2, 1), torch.float64, "cpu")
    flat = {**inputs, "B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}
    assert torch.equal(scan(**flat), scan(**inputs))


BAD = {
    "delta": ({"delta": (2, 8, 31)}, r"expected delta of shape \(b, d, l\)"),
    "shared delta": ({"delta": (2, 4, 31)}, r"expected delta of shape \(b, d / r, l\)"),
    "no multiple": ({"delta": (2, 3, 30)}, "multiple of the channels of delta"),
    "flat delta": ({"delta": (8, 30)}, "expected u .*, delta"),
    "bias of delta": ({"delta": (2, 4, 30)}, r"expected delta_bias of shape \(d / r\) = \(4,\)"),
    "A": ({"A": (7, 2)}, "expected A"),
    "B": ({"B": (2, 3, 2, 30)}, "multiple of the groups"),
    "C": ({"C": (2, 2, 2, 29)}, "expected C"),
    "D": ({"D": (9,)}, "expected D"),
    "bias": ({"delta_bias": (7,)}, "expected delta_bias"),
    "u": ({"u": (8, 30)}, "expected u"),
}


@pytest.mark.parametrize(("replace", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_shapes(replace, message):
    inputs = make_inputs((2, 8, 30, 2, 2), torch.float32, "cpu")
    inputs.update({name: torch.zeros(size) for name, size in replace.items()})
    for function in (scan, scan_ref):
        with pytest.raises(ValueError, match=message):
            function(**inputs)


@needs_build
def test_wrong_dtypes():
    inputs = make_inputs((2, 8, 30, 2, 2), torch.float32, "cpu")
    with pytest.raises(ValueError, match="expected u, delta, B and C all float32"):
        scan(**{**inputs, "u": inputs["u"].half()})
    with pytest.raises(ValueError, match="expected out_dtype float32 or"):
        scan(**inputs, out_dtype=torch.float16)
    many = make_inputs((1, 1, 4, 257, 1), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="expected 1 to 256 states, got 257"):
        scan(**many)


@pytest.mark.parametrize("chunked", [False, True], ids=["sequential", "chunked"])
def test_reference_is_float32_under_autocast(chunked):
    inputs = make_inputs((2, 4, 40, 2, 2), torch.float32, "cpu")
    plain = scan_ref(**inputs, delta_softplus=True, chunked=chunked)
    with torch.autocast("cpu", torch.bfloat16):
        under = scan_ref(**inputs, delta_softplus=True, chunked=chunked)
    results = [(y, *torch.autograd.grad(y.sum(), list(inputs.values()))) for y in (plain, under)]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("chunked", [False, True], ids=["sequential", "chunked"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradcheck_of_the_reference(chunked, reverse):
    inputs = make_inputs((1, 4, 7, 2, 2), torch.float64, "cpu")
    values = [inputs[name].detach().double().requires_grad_() for name in NAMES]

    def function(u, delta, A, B, C, D, bias):
        return scan_ref(
            u, delta, A, B, C, D, None, bias, True, True, reverse=reverse, chunked=chunked
        )

    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [1, 3])
def test_opcheck(share, device):
    inputs = make_inputs((2, 6, 40, 2, 2), torch.float32, device, share=share)
    values = [inputs[name] for name in NAMES]
    forward, backward = (
        torch.ops.selective_scan.selective_scan_fwd,
        torch.ops.selective_scan.selective_scan_bwd,
    )
    torch.library.opcheck(forward.default, (*values, True, False, False, 1))
    values = [x.detach() for x in values]
    torch.library.opcheck(forward.default, (*values, True, False, False, 2))
    y, last, states = forward(*values, True, True, True, 1)
    args = (torch.ones_like(y), torch.ones_like(last), states, *values, True, True)
    torch.library.opcheck(backward.default, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiles_whole(device, autocast):
    inputs = make_inputs((2, 6, 40, 1, 2), torch.float32, device)
    backend = "inductor" if device == "cuda" else "aot_eager"

    def function(u, rest):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return scan(u.cos(), **rest, delta_softplus=True).sin()

    u = inputs.pop("u")
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
        y = call(u, inputs)
        results.append([y, *torch.autograd.grad(y.sum(), [u, *inputs.values()])])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_takes_the_widest(device):
    inputs = make_inputs((2, 6, 40, 1, 2), torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        assert scan(**inputs, delta_softplus=True).dtype == torch.bfloat16
        mixed = {**inputs, "delta": inputs["delta"].float(), "A": inputs["A"].bfloat16()}
        y = scan(**mixed, delta_softplus=True)
    assert y.dtype == torch.float32
    wide = {name: x.float() for name, x in mixed.items()}
    torch.testing.assert_close(y, scan(**wide, delta_softplus=True))
    y.sum().backward()
    assert inputs["u"].grad.dtype == torch.bfloat16


@needs_build
def test_vmap_is_refused():
    inputs = make_inputs((2, 6, 40, 1, 2), torch.float32, "cpu")
    u = inputs.pop("u").detach().expand(3, 2, 6, 40)
    with pytest.raises(NotImplementedError, match="expected a call outside torch.vmap"):
        torch.vmap(lambda u: scan(u, **inputs))(u)


@needs_build
def test_second_derivative_is_refused():
    inputs = make_inputs((1, 2, 8, 1, 1), torch.float32, "cpu")
    (grad,) = torch.autograd.grad(scan(**inputs).sum(), inputs["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative"):
        torch.autograd.grad(grad.sum(), inputs["delta"])


@needs_build
def test_flops():
    inputs = make_inputs((2, 6, 40, 3, 2), torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        y = scan(**inputs)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 9 * 2 * 40 * 6 * 3 + 2 * 40 * 6
    assert counter.get_total_flops() == 3 * forward


@needs_build
def test_meta_tensors():
    inputs = make_inputs((2, 6, 40, 3, 2), torch.float32, "meta")
    assert scan(**inputs).shape == (2, 6, 40)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_are_equal(device):
    """Bit for bit, whether or not PyTorch is asked for deterministic algorithms."""
    inputs = make_inputs((4, 96, 500, 2, 2), torch.float16, device)
    first = run(scan, inputs, {"delta_softplus": True})
    torch.use_deterministic_algorithms(True)
    try:
        second = run(scan, inputs, {"delta_softplus": True})
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
