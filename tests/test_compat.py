"""Code written for other builds, run on these kernels: its calls, layouts, dtypes and gradients.

The truth is the recurrence itself, step by step in float64 or complex128.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from quadmamba.kernels import selective_scan as package

compat = importlib.import_module(f"{package.__name__}.compat")
library = importlib.import_module(f"{package.__name__}.library")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_build = pytest.mark.skipif(library.LOAD_ERROR is not None, reason="needs the built library")
DEVICES = [pytest.param("cpu", marks=needs_build), pytest.param("cuda", marks=needs_gpu)]
MAMBA = ("selective_scan_cuda", "selective_scan_cuda_test")
ONE_STATE = ("selective_scan_cuda_core", "selective_scan_cuda_ndstate")
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
LIMITS = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, of all


@pytest.fixture(autouse=True)
def _installed():
    before = {name: sys.modules.pop(name, None) for name in compat.MODULES}
    compat.install()
    yield
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def make_inputs(shape, dtype, device, *, share=1, constant="", is_complex=False, seed=0):
    """u, delta, A, B, C, D, delta_bias and z. `constant`: those of "BC" that are (d, n)."""
    b, d, l, n, g = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    A = -0.1 - torch.rand(d, n, generator=generator)
    if is_complex:
        A = torch.complex(A, normal(d, n))
    inputs = {
        "u": normal(b, d, l).to(dtype),
        "delta": (normal(b, d // share, l) - 1).to(dtype),
        "A": A,
        "D": normal(d),
        "delta_bias": normal(d // share) / 2,
        "z": normal(b, d, l).to(dtype),
    }
    for name in "BC":
        if name in constant:
            inputs[name] = torch.complex(normal(d, n), normal(d, n)) if is_complex else normal(d, n)
        else:
            inputs[name] = normal(b, g, n, 2 * l if is_complex else l).to(dtype)
    return {name: x.to(device) for name, x in inputs.items()}


def truth(u, delta, A, B, C, D=None, delta_bias=None, z=None, *, softplus=True):
    """y, and the product of the decays and the state after each position, (b, d, l, n)."""
    b, d, l = u.shape
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    dt = dt.repeat_interleave(d // dt.shape[1], 1)

    def by_channel(x):
        if x.dim() == 2:
            return x[None, :, :, None].expand(b, d, -1, l)
        x = torch.view_as_complex(x.unflatten(-1, (l, 2))) if A.is_complex() else x
        return x.repeat_interleave(d // x.shape[1], 1)

    rates = torch.exp(dt[..., None] * A[:, None])  # (b, d, l, n)
    drive = (dt * u)[..., None] * by_channel(B).transpose(2, 3)
    h, decay, states, decays = 0, 1, [], []
    for a, x in zip(rates.unbind(2), drive.unbind(2)):
        h, decay = a * h + x, a * decay
        states.append(h)
        decays.append(decay)
    states, decays = torch.stack(states, 2), torch.stack(decays, 2)
    y = (by_channel(C).transpose(2, 3) * states).sum(-1)
    y = 2 * y.real if A.is_complex() else y
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return y, decays, states


def to_double(inputs):
    """Leaves in double precision."""
    return {
        name: x.detach().to(torch.promote_types(x.dtype, torch.float64)).requires_grad_()
        for name, x in inputs.items()
    }


def assert_near(found, expected, limit, name):
    assert found.shape == expected.shape, name
    error = (found.to(expected.dtype) - expected).norm() / (expected.norm() + 1e-30)
    assert error <= limit, f"{name}: relative error {error:.1e}, limit {limit:.1e}"


def scan_as_vmamba(name, inputs, *, out_float=False, softplus=True):
    """fwd and bwd of a build of VMamba: y, x, dout and the gradients by name."""
    core = importlib.import_module(name)
    *tensors, bias = (inputs.get(key) for key in NAMES)
    more = (True,) if out_float else (False,) if name.endswith("oflex") else ()
    y, x, *_ = core.fwd(*tensors, bias, softplus, 1, *more)
    dout = wave(y)
    grads = core.bwd(*tensors, bias, dout, x, softplus, 1)
    assert len(grads) == 7
    return y, x, dout, dict(zip(NAMES, grads))


def wave(y):
    values = torch.linspace(0, 40, y.numel(), device=y.device, dtype=torch.float64)
    return values.sin().view_as(y).to(y.dtype)


def check_gradients(found, inputs, y, dout, limit):
    """`inputs`: leaves in double precision from which y came. limit: of 16-bit gradients."""
    given = {name: x for name, x in inputs.items() if name in found}
    expected = torch.autograd.grad(y, list(given.values()), dout.to(y.dtype))
    for name, grad in zip(given, expected):
        in_16_bit = found[name].dtype in (torch.float16, torch.bfloat16)
        bound = limit if in_16_bit else min(limit, 1e-4)
        assert_near(found[name], grad, bound, f"gradient of {name}")


def check_x(name, length, dtype, device):
    inputs = make_inputs((2, 6, length, 3, 2), dtype, device)
    build = importlib.import_module(name)
    gate = (None,) if name in MAMBA else ()
    *tensors, bias = (inputs[key] for key in NAMES)
    y, x = build.fwd(*tensors, *gate, bias, True)
    inputs.pop("z")
    expected, decays, states = truth(**{key: t.double() for key, t in inputs.items()})
    b, d, chunks, pairs = x.shape
    assert (b, d, pairs, x.dtype) == (2, 6, 2 * 3, torch.float32)
    assert x.is_contiguous()
    assert_near(x[:, :, -1, 1::2], states[:, :, -1], 2e-5, "last state")
    chunk = 128 if dtype == torch.float32 else 256
    ends = [min(start + chunk, length) - 1 for start in range(0, length, chunk)]
    assert_near(x[..., 1::2], states[:, :, ends], 2e-5, "states")
    assert_near(x[..., 0::2], decays[:, :, ends], 2e-5, "decays")
    assert_near(y, expected, LIMITS[dtype], "y")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 2048, 2049])
def test_K1_last_state_at_odd_places_of_x(length, dtype, device):
    check_x("selective_scan_cuda_oflex", length, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", compat.MODULES)
def test_K1_last_state_of_every_build(name, dtype, device):
    check_x(name, 300, dtype, device)


@needs_build
def test_K1_fwd_records_no_graph():
    inputs = make_inputs((1, 4, 20, 2, 1), torch.float32, "cpu")
    tensors = [inputs[key].requires_grad_() for key in NAMES]
    y, x = compat.fwd(*tensors, True)
    assert not y.requires_grad
    assert not x.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["as it came", "a copy", "none"])
@pytest.mark.parametrize("length", [40, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_K1_bwd_takes_the_x_of_fwd(length, given, dtype, device):
    inputs = make_inputs((2, 6, length, 2, 2), dtype, device)
    inputs.pop("z")
    tensors = [inputs[key] for key in NAMES]
    y, x = compat.fwd(*tensors, True)
    dout = wave(y)
    x = {"as it came": x, "a copy": x.clone(), "none": None}[given]
    double = to_double(inputs)
    expected = truth(**double)[0]
    found = dict(zip(NAMES, compat.bwd(*tensors, dout, x, True)))
    check_gradients(found, double, expected, dout, LIMITS[dtype])


@needs_build
def test_K1_bwd_refuses_another_x():
    inputs = [make_inputs((2, 6, 300, 2, 2), torch.float32, "cpu")[key] for key in NAMES]
    y, x = compat.fwd(*inputs, True)
    expected = r"expected x as fwd returned it .* \(2, 6, 3, 4\), got \(2, 6, 1, 4\)"
    with pytest.raises(ValueError, match=expected):
        compat.bwd(*inputs, y, x[:, :, -1:], True)


# d, channels of delta, groups, length: rows of delta within a group of B, across groups, one
SHARED = {"768 of 24": (768, 24, 2, 70), "across": (12, 4, 6, 300), "one": (10, 1, 2, 33)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", ["selective_scan_cuda_oflex", "selective_scan_cuda_core"])
@pytest.mark.parametrize(("d", "d1", "g", "l"), SHARED.values(), ids=SHARED.keys())
@pytest.mark.parametrize("extras", [True, False], ids=["D and bias", "bare"])
def test_K2_delta_of_fewer_channels(name, d, d1, g, l, extras, dtype, device):
    inputs = make_inputs((2, d, l, 1, g), dtype, device, share=d // d1)
    inputs.pop("z")
    if not extras:
        del inputs["D"], inputs["delta_bias"]
    y, x, dout, found = scan_as_vmamba(name, inputs, out_float=name.endswith("oflex"))
    assert y.dtype == (torch.float32 if name.endswith("oflex") else dtype)
    double = to_double(inputs)
    expected, _, states = truth(**double)
    assert_near(y, expected, LIMITS[dtype], "y")
    assert_near(x[:, :, -1, 1::2], states[:, :, -1], 2e-5, "last state")
    check_gradients(
        {key: grad for key, grad in found.items() if grad is not None},
        double,
        expected,
        dout,
        LIMITS[dtype],
    )
    assert (found["D"] is None) == (found["delta_bias"] is None) == (not extras)
    given = {key: (t.shape, t.dtype) for key, t in inputs.items()}
    assert given == {k: (t.shape, t.dtype) for k, t in found.items() if t is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", ONE_STATE)
def test_K3_one_state_without_its_dimension(name, dtype, device):
    inputs = make_inputs((2, 12, 300, 1, 2), dtype, device)
    inputs.pop("z")
    double = to_double(inputs)
    expected, _, states = truth(**double)
    flat = {**inputs, "A": inputs["A"][:, 0], "B": inputs["B"][:, :, 0], "C": inputs["C"][:, :, 0]}
    y, x, dout, found = scan_as_vmamba(name, flat)
    assert_near(y, expected, LIMITS[dtype], "y")
    assert_near(x[:, :, -1, 1::2], states[:, :, -1], 2e-5, "last state")
    assert (found["A"].shape, found["B"].shape, found["C"].shape) == (
        (12,),
        (2, 2, 300),
        (2, 2, 300),
    )
    full = {key: grad.view(inputs[key].shape) for key, grad in found.items()}
    check_gradients(full, double, expected, dout, LIMITS[dtype])


# share, constant, complex: what Mamba's own build takes, and shared rows of delta beside it
FORMS = {
    "plain": {},
    "shared delta": {"share": 3},
    "constant B": {"constant": "B"},
    "constant C": {"constant": "C"},
    "constant B and C": {"constant": "BC", "share": 2},
    "complex": {"is_complex": True},
    "complex, constant B": {"is_complex": True, "constant": "B", "share": 6},
    "complex, constant C": {"is_complex": True, "constant": "C"},
    "complex, constant B and C": {"is_complex": True, "constant": "BC"},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["z", "no z"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_K3_mambas_own_build(form, gated, dtype, device):
    """z is inside, dz may be given, and out_z is computed again where that is asked for."""
    mamba = importlib.import_module("selective_scan_cuda")
    inputs = make_inputs((2, 12, 150, 3, 2), dtype, device, **form)
    z = inputs["z"] if gated else None
    if not gated:
        inputs.pop("z")
    double = to_double(inputs)
    expected, _, states = truth(**double)
    ungated, decays, _ = truth(**{key: x for key, x in double.items() if key != "z"})
    order = [inputs[key] for key in NAMES[:-1]] + [z, inputs["delta_bias"]]
    y, x, *out_z = mamba.fwd(*order, True)
    assert [t.dtype for t in (y, *out_z)] == [dtype] * (2 if gated else 1)
    assert_near(y, ungated, LIMITS[dtype], "y")
    assert_near((*out_z, y)[0], expected, LIMITS[dtype], "gated y")
    assert_near(x[:, :, -1, 1::2], states[:, :, -1], 2e-5, "last state")
    assert_near(x[:, :, -1, 0::2], decays[:, :, -1], 2e-5, "decay")

    dout = wave(y)
    room = torch.empty(2, 24, 150, dtype=dtype, device=device)[:, 12:] if gated else None
    grads = mamba.bwd(*order, dout, x, y if gated else None, room, True, gated)
    found = dict(zip(NAMES, grads))
    if gated:
        found["z"], again = grads[7:]
        assert found["z"] is room
        assert torch.equal(again, out_z[0])
        more = mamba.bwd(*order, dout, x, y, None, True, False)
        assert len(more) == 8
        assert torch.equal(more[7], room)
    else:
        assert len(grads) == 7
    check_gradients(found, double, expected, dout, 1.5 * LIMITS[dtype])
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
        k: (t.shape, t.dtype) for k, t in inputs.items()
    }


@pytest.mark.parametrize("device", DEVICES)
def test_K3_complex_states_keep_their_phase_in_long_rows(device):
    """Over about 8,000 radians, where float32 steps may add up to 8,000 · 6e-8 = 5e-4 of error."""
    mamba = importlib.import_module("selective_scan_cuda")
    inputs = make_inputs((1, 2, 3000, 2, 1), torch.float32, device, is_complex=True)
    inputs["A"] = torch.complex(-0.01 * torch.rand(2, 2), 3 + torch.rand(2, 2)).to(device)
    double = to_double(inputs)
    expected, decays, states = truth(**double)
    _, x, y = mamba.fwd(**inputs, delta_softplus=True)
    assert_near(y, expected, 1e-4, "y")
    assert_near(x[:, :, -1, 1::2], states[:, :, -1], 1e-4, "last state")
    assert decays[:, :, -1].abs().min() > 1e-12


@needs_build
def test_K3_what_has_no_kernel_warns_once(monkeypatch):
    monkeypatch.setattr(library, "_warned", set())
    mamba = importlib.import_module("selective_scan_cuda")
    plain, constant = (
        make_inputs((1, 4, 20, 2, 1), torch.float32, "cpu", constant=names) for names in ("", "B")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mamba.fwd(**plain, delta_softplus=True)
    with pytest.warns(RuntimeWarning, match="no kernel: running state by state in float32") as seen:
        mamba.fwd(**constant, delta_softplus=True)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mamba.fwd(**constant, delta_softplus=True)


@needs_build
def test_K3_without_z_a_request_for_out_z_gives_none():
    inputs = make_inputs((1, 4, 20, 2, 1), torch.float32, "cpu")
    order = [inputs[key] for key in NAMES[:-1]] + [None, inputs["delta_bias"]]
    mamba = importlib.import_module("selective_scan_cuda")
    y, x = mamba.fwd(*order, True)
    assert mamba.bwd(*order, y, x, None, None, True, True)[7:] == [None]
    order[-2] = inputs["z"]
    with pytest.raises(ValueError, match="expected out, which fwd returned, beside z"):
        mamba.bwd(*order, y, x, None, None, True, False)


def autograd_function(build, gated):
    """An autograd function as wrappers have it: saved x, dense dout, y in the dtype of u."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, bias, z):
            gate = (z,) if gated else ()
            more = () if gated else (1, True)
            y, x, *rest = build.fwd(u, delta, A, B, C, D, *gate, bias, True, *more)
            ctx.save_for_backward(u, delta, A, B, C, D, bias, z, x, y)
            return rest[0] if gated else y.to(u.dtype), x[:, :, -1, 1::2]

        @staticmethod
        def backward(ctx, dout, _):
            u, delta, A, B, C, D, bias, z, x, y = ctx.saved_tensors
            if gated:
                ends = x, y, None, True, False
                *grads, dz = build.bwd(u, delta, A, B, C, D, z, bias, dout, *ends)
                return *grads, dz
            return *build.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1), None

    return Function.apply


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [True, False], ids=["mamba", "oflex"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_K3_wrappers_train_through_it(gated, autocast, device):
    """Strided u and dout, 16-bit rows beside float32 parameters, B and C slices of one tensor."""
    build = importlib.import_module(f"selective_scan_cuda{'' if gated else '_oflex'}")
    inputs = make_inputs((2, 6, 300, 2, 2), torch.bfloat16, device)
    double = to_double(inputs)
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([inputs["B"], inputs["C"]], 2)
    inputs["B"], inputs["C"] = both[:, :, :2], both[:, :, 2:]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y, last = autograd_function(build, gated)(*(leaves[k] for k in (*NAMES, "z")))
    assert y.dtype == torch.bfloat16
    expected, _, states = truth(**(double if gated else {**double, "z": None}))
    assert_near(y, expected, LIMITS[torch.bfloat16], "y")
    assert_near(last, states[:, :, -1], 2e-5, "last state")
    dout = wave(y.transpose(1, 2)).transpose(1, 2)
    used = [name for name in leaves if gated or name != "z"]
    found = torch.autograd.grad(y, [leaves[name] for name in used], dout)
    given = {name: x for name, x in double.items() if name in used}
    check_gradients(dict(zip(used, found)), given, expected, dout, 1.5 * LIMITS[torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wide", ["u", "delta", "B", "C"])
def test_K3_mixed_dtypes_run_in_the_widest(wide, device):
    inputs = make_inputs((2, 6, 40, 2, 2), torch.bfloat16, device)
    inputs.pop("z")
    inputs[wide] = torch.randn_like(inputs[wide], dtype=torch.float32)
    inputs.update({name: inputs[name].bfloat16() for name in ("A", "D", "delta_bias")})
    y, x, dout, found = scan_as_vmamba("selective_scan_cuda_core", inputs)
    assert y.dtype == inputs["u"].dtype
    double = to_double(inputs)
    expected, *_ = truth(**double)
    assert_near(y, expected, LIMITS[y.dtype], "y")
    check_gradients(found, double, expected, dout, LIMITS[torch.bfloat16])
    assert [found[k].dtype for k in NAMES] == [inputs[k].dtype for k in NAMES]


REFUSED = {
    "nrows": ({}, {"nrows": 0}, "expected nrows >= 1, got 0"),
    "delta": ({"delta": (2, 4, 30)}, {}, "expected d to be a multiple of the channels of delta"),
    "B": ({"B": (2, 4, 2, 30)}, {}, "expected d to be a multiple of the groups of B"),
    "constant B": ({"B": (6, 3)}, {}, r"expected B \(d, n\) = \(6, 2\)"),
    "constant C beside B": ({"B": (6, 2), "C": (2, 2, 2, 29)}, {}, "expected C .* with l = 30"),
    "A": ({"A": (5, 2), "B": (5, 2)}, {}, r"expected u \(b, d, l\) and A \(d, n\)"),
}


@needs_build
@pytest.mark.parametrize(("shapes", "more", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_K3_what_does_not_fit_is_refused(shapes, more, message):
    mamba = importlib.import_module("selective_scan_cuda")
    inputs = make_inputs((2, 6, 30, 2, 2), torch.float32, "cpu")
    inputs.update({name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=message):
        mamba.fwd(**inputs, delta_softplus=True, **more)


@needs_build
def test_K3_dtypes_without_a_kernel_are_refused():
    inputs = make_inputs((2, 6, 30, 2, 2), torch.float32, "cpu", is_complex=True)
    z = inputs.pop("z")
    with pytest.raises(ValueError, match="expected a real A, got torch.complex64"):
        compat.fwd(**inputs, delta_softplus=True)
    mamba = importlib.import_module("selective_scan_cuda")
    with pytest.raises(ValueError, match="of the dtype of A, torch.complex64, or real"):
        mamba.fwd(**{**inputs, "B": torch.zeros(6, 2)}, z=z, delta_softplus=True)
    with pytest.raises(ValueError, match="expected u in float32, float16 or bfloat16"):
        compat.fwd(**{**inputs, "u": inputs["u"].double()}, delta_softplus=True)


def test_K3_without_library_says_how_to_build(monkeypatch):
    monkeypatch.setattr(library, "LOAD_ERROR", "not built")
    nothing = [None] * 7
    with pytest.raises(RuntimeError, match="pip install"):
        compat.fwd(*nothing, True)
    for name in compat.MODULES:
        with pytest.raises(RuntimeError, match="expected the compiled kernels, but not built"):
            importlib.import_module(name).fwd(*nothing, *([None] if name in MAMBA else []), True)


def test_K3_all_names_are_installed_and_given_back():
    names = {f"selective_scan_cuda{end}" for end in ("", "_core", "_oflex", "_ndstate", "_nrow")}
    assert names < set(compat.MODULES)
    for name in compat.MODULES:
        assert importlib.util.find_spec(name) is not None
        assert callable(importlib.import_module(name).bwd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.install() == compat.MODULES  # a second time, over its own
    compat.uninstall()
    assert not any(name in sys.modules for name in compat.MODULES)


def test_K3_install_takes_names_and_says_what_it_replaces():
    compat.uninstall()
    real = types.ModuleType("selective_scan_cuda")
    real.fwd = real.bwd = lambda *_: None
    sys.modules["selective_scan_cuda"] = real
    assert compat.install("selective_scan_cuda_core") == ("selective_scan_cuda_core",)
    assert "selective_scan_cuda_oflex" not in sys.modules
    assert sys.modules["selective_scan_cuda"] is real
    with pytest.warns(RuntimeWarning, match="selective_scan_cuda of another build was imported"):
        compat.install()
    assert sys.modules["selective_scan_cuda"] is not real
    sys.modules["selective_scan_cuda"] = real
    compat.uninstall()
    assert sys.modules["selective_scan_cuda"] is real
    with pytest.raises(ValueError, match="expected names among .* got selective_scan_gpu"):
        compat.install("selective_scan_gpu")
