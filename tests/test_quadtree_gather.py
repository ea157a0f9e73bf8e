"""Quadtree gather: kernels against the float64 reference, and the decision's gradient alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from runs import passed

from quadmamba.kernels.quadtree_gather import (
    decision_grad,
    decision_grad_ref,
    gather_in,
    gather_in_ref,
    gather_out,
    gather_out_ref,
    invert_maps,
)
from quadmamba.models.orders import QuadtreeOrder, ReleaseOrder

ORDERS = {"quadtree": QuadtreeOrder(), "release": ReleaseOrder()}
DIRECTIONS = {"in": (gather_in, gather_in_ref), "out": (gather_out, gather_out_ref)}
EPS = {torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float32: 1e-6}
CASES = {  # b, h, w, d
    "even": (3, 8, 8, 24),
    "odd_sides": (2, 7, 5, 3),
    "one_token": (2, 1, 1, 8),
    "one_row": (1, 1, 9, 5),
    "long": (1, 12, 20, 70),
}
GPU_CASES = {
    **CASES,
    "stage1": (4, 56, 56, 192),
    "wide": (1, 4, 4, 70000),
    "row_20000": (1, 100, 200, 16),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, below")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def index_maps(order: str, h: int, w: int, device: str = "cpu"):
    rule = ORDERS[order]
    return rule.maps(h, w, rule.shift(h, w, (1, -1)), torch.device(device))


def one_hot(b: int, device: str = "cpu") -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(b, device=device) % 4, 4).float()


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    assert torch.isfinite(value).all()
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-12)).item()


def gradients(op, x, decision, maps, grad):
    x, decision = x.clone().requires_grad_(), decision.clone().requires_grad_()
    out = op(x, decision, maps.fine, maps.coarse, maps.quadrant)
    return dict(
        zip(("out", "dx", "ddecision"), (out, *torch.autograd.grad(out, (x, decision), grad)))
    )


def compare(direction, order, case, dtype, device, decision=None):
    b, h, w, d = case
    op, ref = DIRECTIONS[direction]
    maps = index_maps(order, h, w, device)
    x, grad = torch.randn(2, b, h * w, d, device=device).to(dtype)
    decision = one_hot(b, device) if decision is None else decision
    ours = gradients(op, x, decision, maps, grad)
    plain = gradients(ref, x, decision.to(dtype), maps, grad)
    truth = gradients(ref, x.double(), decision.double(), maps, grad.double())
    for name, value in ours.items():
        bound = 2 * relative(plain[name], truth[name]) + EPS[dtype]
        assert relative(value, truth[name]) <= bound, name
    if ((decision == 0) | (decision == 1)).all() and order == "quadtree":
        assert torch.equal(ours["out"], truth["out"].to(dtype)), "a permutation is exact"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_on_cpu(direction, order, case):
    compare(direction, order, case, torch.float32, "cpu")


@needs_gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_kernel(direction, order, case, dtype):
    compare(direction, order, case, dtype, "cuda")


@needs_gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kernel_takes_any_decision(direction):
    decision = torch.randn(3, 4, device="cuda")
    compare(direction, "release", CASES["even"], torch.float32, "cuda", decision)


@needs_gpu
def test_kernel_beyond_32_bit_offsets():
    b, h, w, d = 90, 56, 56, 8192  # 2.3e9 elements
    maps = index_maps("quadtree", h, w, "cuda")
    x = torch.zeros(b, h * w, d, dtype=torch.float16, device="cuda")
    x[-1] = torch.arange(h * w, device="cuda")[:, None] % 2039
    out = gather_in(x, one_hot(b, "cuda"), maps.fine, maps.coarse, maps.quadrant)
    table = maps.tables[(b - 1) % 4].long()
    assert torch.equal(out[-1], x[-1, table])


@needs_gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kernel_is_bit_equal_and_follows_the_stream(direction):
    op = DIRECTIONS[direction][0]
    maps = index_maps("release", 28, 28, "cuda")
    x, grad = torch.randn(2, 8, 784, 96, device="cuda").half()
    first = gradients(op, x, one_hot(8, "cuda"), maps, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = gradients(op, x, one_hot(8, "cuda"), maps, grad)
    stream.synchronize()
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_gpu
def test_kernel_in_a_cuda_graph():
    maps = index_maps("quadtree", 14, 14, "cuda")
    args = (one_hot(2, "cuda"), maps.fine, maps.coarse, maps.quadrant)
    x = torch.randn(2, 196, 32, device="cuda")
    gather_in(x, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gather_in(x, *args)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, gather_in_ref(x, *args))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opcheck_and_compile(direction, device):
    op = DIRECTIONS[direction][0]
    maps = index_maps("release", 4, 6, device)
    x = torch.randn(2, 24, 5, device=device, requires_grad=True)
    decision = one_hot(2, device).requires_grad_()
    index = (maps.fine, maps.coarse, maps.quadrant, invert_maps(maps.fine, maps.coarse))
    torch.library.opcheck(
        torch.ops.quadmamba.quadtree_gather.default, (x, decision, *index, direction == "in")
    )
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    grad = torch.randn_like(x)
    eager, traced = (
        gradients(f, x.detach(), decision.detach(), maps, grad) for f in (op, compiled)
    )
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reference_gradcheck(direction):
    maps = index_maps("release", 4, 4)
    x = torch.randn(1, 16, 2, dtype=torch.double, requires_grad=True)
    decision = torch.rand(1, 4, dtype=torch.double, requires_grad=True)
    for op in DIRECTIONS[direction]:
        assert torch.autograd.gradcheck(
            lambda x, m, op=op: op(x, m, maps.fine, maps.coarse, maps.quadrant), (x, decision)
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_sliced_and_empty_inputs(device):
    maps = index_maps("quadtree", 4, 4, device)
    index = (maps.fine, maps.coarse, maps.quadrant)
    x = torch.randn(4, 16, 12, device=device)[::2, :, 2::3]
    assert torch.equal(
        gather_in(x, one_hot(2, device), *index), gather_in_ref(x, one_hot(2, device), *index)
    )
    empty = gradients(gather_in, x[:0], one_hot(0, device), maps, x[:0])
    assert empty["dx"].shape == (0, 16, 4)
    assert empty["ddecision"].shape == (0, 4)


def route_gradient(x, decision, maps, f, weight):
    """Gradients of x and decision through gather_in -> f -> gather_out, all by autograd."""
    x, decision = x.clone().requires_grad_(), decision.clone().requires_grad_()
    index = (decision, maps.fine, maps.coarse, maps.quadrant)
    out = gather_out_ref(f(gather_in_ref(x, *index)), *index)
    return torch.autograd.grad((out * weight).sum(), (x, decision))


def causal(x):
    """A function of the whole sequence up to each position, not linear."""
    return torch.tanh(x.cumsum(1) * 0.3) + x * x


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("sides", [(8, 8), (7, 6), (20, 12)], ids=str)
@pytest.mark.parametrize("grad_fn", [decision_grad, decision_grad_ref])
def test_decision_grad_equals_autograd(device, sides, grad_fn):
    maps = index_maps("quadtree", *sides, device)
    x, weight = torch.randn(2, 5, sides[0] * sides[1], 6, device=device, dtype=torch.double)
    decision = one_hot(5, device).double()
    truth = route_gradient(x, decision, maps, causal, weight)
    choice = decision.argmax(-1)
    order = maps.tables.long()[choice][..., None].expand_as(x)
    x = x.clone().requires_grad_()
    y = torch.zeros_like(x).scatter(1, order, causal(x.gather(1, order)))
    gx = torch.autograd.grad((y * weight).sum(), x)[0]
    assert relative(gx, truth[0]) < 1e-12
    index = (choice, maps.tables, maps.fine, maps.coarse, maps.quadrant)
    pairs = [(x.detach(), gx), (weight, y.detach())]
    if device == "cuda" and grad_fn is decision_grad:
        pairs = [(v.float(), w.float()) for v, w in pairs]
    tolerance = 1e-12 if pairs[0][0].dtype == torch.double else 1e-5
    assert relative(grad_fn(pairs, *index), truth[1]) < tolerance


@needs_gpu
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_decision_grad_kernel_dtypes(dtype):
    maps = index_maps("quadtree", 56, 56, "cuda")
    index = (
        torch.tensor([0, 3], device="cuda"),
        maps.tables,
        maps.fine,
        maps.coarse,
        maps.quadrant,
    )
    pairs = [tuple(torch.randn(2, 2, 3136, d, device="cuda").to(dtype)) for d in (192, 16)]
    pairs.append((pairs[0][0], pairs[0][1].float()))
    truth = decision_grad_ref([(v.double(), w.double()) for v, w in pairs], *index)
    plain = decision_grad_ref(pairs, *index)
    assert relative(decision_grad(pairs, *index), truth) <= 2 * relative(plain, truth) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_fn", [decision_grad, decision_grad_ref])
def test_decision_grad_of_half_tokens_is_summed_in_float32(grad_fn, dtype):
    """Sums of whole numbers: exact in float32, and too large for 16 bits."""
    maps = index_maps("quadtree", 64, 64)
    v, w = torch.randint(0, 64, (2, 1, 4096, 3)).to(dtype)
    choice = torch.tensor([2])
    index = (choice, maps.tables, maps.fine, maps.coarse, maps.quadrant)
    sums = grad_fn([(v, w)], *index)
    token = maps.tables.long()[choice[0]]  # at each position
    first, second = (w[0, token[m.long()]].double() for m in (maps.fine, maps.coarse))
    dots = (v[0].double() * (first - second)).sum(1)
    expected = torch.zeros(4, dtype=torch.double).index_add(0, maps.quadrant.long(), dots)
    assert sums.dtype == torch.float32
    assert torch.equal(sums[0].double(), expected)
    assert not torch.equal(sums.to(dtype).float(), sums)


def test_opcheck_decision_grad():
    maps = index_maps("quadtree", 4, 4)
    choice = torch.tensor([1, 2], dtype=torch.int32)
    v, w = [torch.randn(2, 16, 3)], [torch.randn(2, 16, 3)]
    args = (v, w, choice, maps.tables, maps.fine, maps.coarse, maps.quadrant)
    torch.library.opcheck(torch.ops.quadmamba.quadtree_decision_grad.default, args)


ERRORS = {
    "tokens": (lambda a: {**a, "x": a["x"][0]}, "floating tokens of shape"),
    "decision": (lambda a: {**a, "decision": a["decision"][:, :3]}, "decision of shape"),
    "map_dtype": (lambda a: {**a, "fine": a["fine"].float()}, "fine as integers"),
    "map_length": (lambda a: {**a, "coarse": a["coarse"][1:]}, "coarse as integers"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected(name):
    maps = index_maps("quadtree", 4, 4)
    args = {
        "x": torch.randn(2, 16, 3),
        "decision": one_hot(2),
        "fine": maps.fine,
        "coarse": maps.coarse,
        "quadrant": maps.quadrant,
    }
    change, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        gather_in(*change(args).values())


@interpreted
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inward", [True, False])
def test_interpreted_gather(order, inward):
    from quadmamba.kernels.quadtree_gather import triton as kernels

    maps = index_maps(order, 7, 6)
    x, other = torch.randn(2, 3, 42, 5)
    decision = one_hot(3)
    inverse = invert_maps(maps.fine, maps.coarse)
    rows = tuple(inverse) if inward else (maps.fine, maps.coarse)
    out, sums = kernels.two_source(
        x, decision, *rows, maps.quadrant, tokens=not inward, other=other
    )
    there, back = (gather_in_ref, gather_out_ref) if inward else (gather_out_ref, gather_in_ref)
    torch.testing.assert_close(out, there(x, decision, maps.fine, maps.coarse, maps.quadrant))
    truth = gradients(back, other, decision, maps, x)["ddecision"]
    torch.testing.assert_close(sums, truth)
    alone = kernels.two_source(x, decision, *rows, maps.quadrant, tokens=not inward)
    assert torch.equal(alone[0], out)


@interpreted
def test_interpreted_decision_grad():
    from quadmamba.kernels.quadtree_gather import triton as kernels

    maps = index_maps("quadtree", 7, 6)
    index = (torch.tensor([0, 3, 1]), maps.tables, maps.fine, maps.coarse, maps.quadrant)
    pairs = [tuple(torch.randn(2, 3, 42, d)) for d in (5, 70)]
    sums = kernels.decision_grad(*map(list, zip(*pairs)), *index)
    torch.testing.assert_close(sums, decision_grad_ref(pairs, *index))


@pytest.mark.skipif(INTERPRETED, reason="would start itself")
def test_triton_interpreter():
    """The Triton kernels on the CPU, in a process of its own: the switch is read at import."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "interpreted"]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert passed(done) >= 5
