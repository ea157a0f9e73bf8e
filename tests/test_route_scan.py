"""route_scan, the scan that the model runs, against its float64 definition: y and all gradients."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quadmamba.kernels import selective_scan as package

library = importlib.import_module(f"{package.__name__}.library")
route_ops = importlib.import_module(f"{package.__name__}.route_ops")
reference = importlib.import_module(f"{package.__name__}.reference")
scan, scan_ref = package.route_scan, package.route_scan_ref

NAMES = ("x", "proj", "dt_weight", "dt_bias", "A", "D")
# Beside twice the error of plain PyTorch in the same dtype: sums in another order and the
# special-function unit; in 16-bit the gradients of the weights come from tensor-core products of
# 11 bits (relative 2e-4).
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
UNDERFLOW = 1e-30  # kernels may take such numbers for zero

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_build = pytest.mark.skipif(library.LOAD_ERROR is not None, reason="needs the built library")
DEVICES = [
    pytest.param("cpu", marks=needs_build),
    pytest.param("cuda", marks=[needs_gpu, needs_build]),
]

# b, l, d, r, k, n
CASES = {
    "l1": (1, 1, 8, 2, 1, 1),
    "l2-n2": (2, 2, 10, 4, 2, 2),
    "l7-k3-odd": (1, 7, 33, 3, 3, 1),
    "l49-stage4": (2, 49, 128, 48, 4, 1),
    "l63": (3, 63, 24, 6, 2, 1),
    "l64": (3, 64, 96, 6, 2, 1),
    "l65-n16": (1, 65, 40, 6, 2, 16),
    "l129-unpaired": (2, 129, 100, 8, 4, 1),
    "l196-stage3": (2, 196, 72, 24, 4, 1),
    "l784-stage2": (1, 784, 48, 12, 2, 1),
    "l3136-stage1": (1, 3136, 24, 6, 2, 1),
    "l3137": (1, 3137, 16, 6, 2, 1),
    "b1-r70": (1, 90, 34, 70, 2, 1),
    "n3": (2, 128, 16, 16, 4, 3),
    "n64": (1, 70, 18, 2, 2, 64),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# Of routes that go both ways along a row of tables, in shapes that the lane kernels take
BOTH_WAYS_CASES = {
    "l1": (2, 1, 8, 2, 2, 1),
    "l15-r3": (3, 15, 48, 3, 2, 1),
    "l16": (2, 16, 64, 4, 2, 1),
    "l17-d40": (2, 17, 40, 6, 4, 1),
    "l49-stage4": (2, 49, 1536, 48, 4, 1),
    "l196-stage3": (2, 196, 768, 24, 4, 1),
    "l200-d96-r32": (1, 200, 96, 32, 4, 1),
    "l784-stage2": (2, 784, 384, 12, 2, 1),
    "l3136-stage1": (1, 3136, 192, 6, 2, 1),
    "l3137-d128": (1, 3137, 128, 8, 2, 1),
    "l700-k4": (1, 700, 64, 4, 4, 1),
    "l1043-k4-d40": (2, 1043, 40, 20, 4, 1),
    "n2-d33": (2, 65, 33, 3, 2, 2),
}


def make_inputs(case, dtype, device, *, shared=False, both_ways=False, seed=0):
    """The six tensors and the rest: random orders, per image or (`shared`) one for all."""
    b, l, d, r, k, n = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    tensors = {
        "x": normal(b, l, d).to(dtype),
        "proj": normal(b, l, k, r + 2 * n).to(dtype),
        "dt_weight": normal(k, d, r) * r**-0.5,
        "dt_bias": 1.5 * normal(k, d) - 3,
        "A": -(0.5 * normal(k, d, n)).exp(),
        "D": normal(k, d),
    }
    tables = torch.stack([torch.randperm(l, generator=generator) for _ in range(4)])
    select = torch.randint(0, 4, (1 if shared else b, k), generator=generator)
    reverse = [i >= k / 2 if shared or both_ways else bool(i % 2) for i in range(k)]
    if both_ways:
        select = select[:, : k // 2]
    tensors = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
    return tensors, (tables.to(device), select.to(device).int(), reverse)


def run(function, tensors, rest, **options):
    """Output and the gradients of a fixed weighting of it, by name."""
    y = function(**tensors, tables=rest[0], select=rest[1], reverse=rest[2], **options)
    wave = torch.linspace(0, 40, y.numel(), device=y.device, dtype=torch.float64).sin()
    weight = wave.view_as(y).to(tensors["x"].dtype).to(y.dtype)
    found = torch.autograd.grad(y, list(tensors.values()), weight)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(tensors, found)}}


def check(tensors, rest, **options):
    """Kernel error at most twice that of plain PyTorch plus eps, both against float64."""
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    truth, plain = run(scan_ref, wide, rest), run(scan_ref, tensors, rest)
    if options:
        plain["y"] = plain["y"].to(options["out_dtype"])
    eps = TOLERANCES[tensors["x"].dtype]
    for name, found in run(scan, tensors, rest, **options).items():
        scale = truth[name].norm()
        error = (found.double() - truth[name]).norm()
        limit = 2 * (plain[name].double() - truth[name]).norm() + eps * scale + UNDERFLOW
        assert found.dtype == plain[name].dtype, name
        assert error <= limit, f"{name}: error {error:.1e} of {scale:.1e}, {limit:.1e} allowed"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case, dtype, device):
    check(*make_inputs(case, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", BOTH_WAYS_CASES.values(), ids=BOTH_WAYS_CASES)
def test_both_ways_along_a_row(case, dtype, device):
    tensors, rest = make_inputs(case, dtype, device, both_ways=True)
    check(tensors, rest, out_dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=list(DTYPES)[1:])
@pytest.mark.parametrize("case", ["l129-unpaired", "l784-stage2", "n3"])
def test_output_in_input_dtype(case, dtype, device):
    check(*make_inputs(CASES[case], dtype, device, shared=True), out_dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    tensors, rest = make_inputs((0, 5, 8, 2, 2, 1), torch.float32, device)
    for name, found in run(scan, tensors, rest).items():
        assert found.abs().sum() == 0, name


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_and_shifted(device):
    tensors, rest = make_inputs((2, 70, 24, 6, 2, 1), torch.float16, device)
    expected = run(scan, tensors, rest)
    moved = {}
    for name, tensor in tensors.items():
        room = torch.empty(
            *tensor.shape[:-1], 2 * tensor.shape[-1] + 1, device=device, dtype=tensor.dtype
        )
        moved[name] = room[..., 1::2].copy_(tensor.detach()).requires_grad_()
    base = torch.empty(tensors["x"].numel() + 1, device=device, dtype=torch.float16)
    moved["x"] = base[1:].view_as(tensors["x"]).copy_(tensors["x"].detach()).requires_grad_()
    wide = torch.stack([rest[0], rest[0]], 2)[..., 0], *rest[1:]
    for name, found in run(scan, moved, wide).items():
        torch.testing.assert_close(found, expected[name], rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_large_delta_lets_the_decay_underflow(device):
    tensors, rest = make_inputs((1, 200, 16, 6, 2, 1), torch.float32, device)
    with torch.no_grad():
        tensors["dt_bias"].fill_(80.0)
        tensors["A"].mul_(4.0)
    check(tensors, rest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("both_ways", [False, True])
def test_two_runs_give_equal_bits(device, both_ways):
    tensors, rest = make_inputs((3, 196, 72, 24, 4, 1), torch.float16, device, both_ways=both_ways)
    first, second = (run(scan, tensors, rest, out_dtype=torch.float16) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    tensors, (tables, select, reverse) = make_inputs((2, 70, 12, 4, 2, 1), torch.float32, device)
    bits = sum(flag << i for i, flag in enumerate(reverse))
    arguments = (*tensors.values(), tables, select, bits, True)
    torch.library.opcheck(torch.ops.selective_scan.route_scan_fwd.default, arguments)
    plain = [tensor.detach() for tensor in tensors.values()]
    y, states = torch.ops.selective_scan.route_scan_fwd(*plain, tables, select, bits, True)
    arguments = (torch.ones_like(y), *plain, tables, select, states, bits)
    torch.library.opcheck(torch.ops.selective_scan.route_scan_bwd.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_one_graph(device):
    tensors, rest = make_inputs((2, 70, 12, 4, 2, 1), torch.float32, device)
    expected = run(scan, tensors, rest)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for name, found in run(compiled, tensors, rest).items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_features_and_widens_weights(device):
    tensors, rest = make_inputs((2, 70, 12, 4, 2, 1), torch.bfloat16, device)
    expected = run(scan, tensors, rest)
    mixed = dict(tensors)
    mixed["dt_weight"] = tensors["dt_weight"].detach().bfloat16().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        found = run(scan, mixed, rest)
    assert found["y"].dtype == torch.float32
    assert found["ddt_weight"].dtype == torch.bfloat16
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("chunked", [False, True], ids=["sequential", "chunked"])
def test_reference_is_float32_under_autocast(chunked):
    tensors, rest = make_inputs((2, 70, 12, 4, 2, 1), torch.float32, "cpu")
    plain = scan_ref(*tensors.values(), *rest, chunked=chunked)
    with torch.autocast("cpu", torch.bfloat16):
        under = scan_ref(*tensors.values(), *rest, chunked=chunked)
    results = [(y, *torch.autograd.grad(y.sum(), list(tensors.values()))) for y in (plain, under)]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_float64_is_the_reference():
    tensors, rest = make_inputs((1, 5, 3, 2, 2, 2), torch.float64, "cpu")
    names = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    assert scan(**names, tables=rest[0], select=rest[1], reverse=rest[2]).dtype == torch.float64

    def sequential(*values):
        return scan_ref(*values, *rest, chunked=False)

    assert torch.autograd.gradcheck(sequential, tuple(names.values()))


@needs_build
def test_flops_are_counted():
    b, l, d, r, k, n = case = (2, 7, 8, 3, 2, 1)
    tensors, rest = make_inputs(case, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        run(scan, tensors, rest)
    assert counter.get_total_flops() == 3 * k * b * l * d * (9 * n + 1 + 2 * r)


@needs_build
def test_vmap_is_refused():
    tensors, rest = make_inputs((2, 5, 4, 2, 2, 1), torch.float32, "cpu")
    plain = [tensor.detach() for tensor in tensors.values()]
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: scan(x, *plain[1:], *rest))(plain[0][None])


@needs_build
def test_second_derivative_is_refused():
    tensors, rest = make_inputs((1, 5, 4, 2, 2, 1), torch.float32, "cpu")
    y = scan(**tensors, tables=rest[0], select=rest[1], reverse=rest[2])
    (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj": torch.zeros(2, 5, 2, 3)}, "expected proj of shape"),
        ({"select": torch.zeros(3, 2, dtype=torch.int32)}, "expected select"),
        ({"select": torch.zeros(2, 1, dtype=torch.int32), "reverse": [True, False]}, "2 / 2"),
        ({"tables": torch.zeros(4, 5)}, "expected integer tables"),
        ({"out_dtype": torch.float16}, "expected out_dtype"),
    ],
    ids=["proj", "select", "one-way", "tables", "out_dtype"],
)
def test_wrong_arguments_say_what_was_expected(change, message):
    tensors, (tables, select, reverse) = make_inputs((2, 5, 4, 2, 2, 1), torch.float32, "cpu")
    arguments = {**tensors, "tables": tables, "select": select, "reverse": reverse, **change}
    with pytest.raises(ValueError, match=message):
        scan(**arguments)


@needs_build
def test_mixed_dtypes_are_refused():
    tensors, rest = make_inputs((2, 5, 4, 2, 2, 1), torch.float32, "cpu")
    tensors["x"] = tensors["x"].half()
    with pytest.raises((ValueError, RuntimeError), match="dtype"):
        scan(**tensors, tables=rest[0], select=rest[1], reverse=rest[2])


def test_missing_kernel_warns_once_and_runs_the_reference(monkeypatch):
    tensors, rest = make_inputs((1, 5, 4, 2, 2, 1), torch.float32, "cpu")
    monkeypatch.setattr(route_ops, "KERNELS", frozenset())
    monkeypatch.setattr(library, "_warned", set())
    with pytest.warns(RuntimeWarning, match="Build it"):
        found = run(scan, tensors, rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(scan, tensors, rest)
    expected = run(scan_ref, tensors, rest)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        assert torch.equal(again[name], expected[name]), name
