"""Mixers and blocks as one node give the numbers of their parts and keep no more than these."""

import pytest
import torch
from node_cases import (  # noqa: F401
    CALLS,
    MIXERS,
    SIZE,
    _ran,
    as_parts,
    assert_same,
    block_call,
    first_call,
    fuse,
    gradients,
    lively,
    make_block,
    make_mixer,
    needs_kernels,
)
from test_fused_interpreted import _range, interpreted  # noqa: F401

from quadmamba.kernels import selective_scan
from quadmamba.kernels.fused.casts import cast, cast_all, cast_together
from quadmamba.kernels.fused.predictor import ops as predictor
from quadmamba.kernels.nodes import block as kernels_block
from quadmamba.kernels.nodes import mixer as kernels_mixer
from quadmamba.kernels.nodes.steps import steps_of
from quadmamba.models import QuadMamba
from quadmamba.models.orders import ORDERS

pytestmark = needs_kernels


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_same_numbers_as_the_parts(name, kind, fused, ran, monkeypatch):
    make, call, expected = CALLS[kind]
    module, x = make(name), torch.randn(*SIZE, 8)
    if fused:
        fuse(monkeypatch)
    truth = as_parts(monkeypatch, lambda: gradients(module, call, x))
    assert ran == []
    found = gradients(module, call, x)
    assert ran == expected
    assert_same(found, truth, 2e-5)
    with torch.no_grad():
        torch.manual_seed(5)
        outputs = call(module, x)
    assert all(torch.equal(out, found[f"out{i}"]) for i, out in enumerate(outputs))


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", ["raster", "quadtree"])
def test_under_autocast(name, kind, ran, monkeypatch):
    make, call, expected = CALLS[kind]
    module, x = make(name), torch.randn(*SIZE, 8)
    fuse(monkeypatch)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(module, call, x)

    truth = as_parts(monkeypatch, run)
    found = run()
    assert ran == expected
    assert_same(found, truth, 3e-2)
    assert found["out0"].dtype == (torch.bfloat16 if kind == "mixer" else torch.float32)


@pytest.mark.parametrize(
    "frozen", ["in_proj", "op.out_proj", "conv", "predictor", "ssm", "", "norm"]
)
def test_frozen_parameters(frozen, ran, monkeypatch):
    block, x = make_block("quadtree"), torch.randn(*SIZE, 8)
    for name, param in block.named_parameters():
        param.requires_grad_(frozen not in name)
    truth = as_parts(monkeypatch, lambda: gradients(block, block_call, x))
    assert_same(gradients(block, block_call, x), truth, 2e-5)
    assert ran == [], "a node keeps and finds what all gradients want"
    with torch.no_grad():
        block_call(block, x)
        assert ran == ["Block", "Mixer"]
        constant = x.clone()
    out = sum(o.sum() for o in first_call(block, constant))
    assert out.requires_grad == (frozen != "")


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", ["raster", "quadtree", "random"])
def test_no_more_is_kept_than_by_the_parts(name, kind, ran, monkeypatch):
    make, call, _ = CALLS[kind]
    module, x = make(name), torch.randn(*SIZE, 8)
    fuse(monkeypatch)

    def kept():
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = call(module, x.clone().requires_grad_())
        return sum(sizes.values()), outputs

    by_parts, node = as_parts(monkeypatch, kept)[0], kept()[0]
    assert ran
    assert node <= by_parts


@pytest.mark.parametrize("order", ORDERS)
def test_the_whole_model(order, ran, monkeypatch):
    torch.manual_seed(0)
    model = QuadMamba(
        (8, 8, 12, 16), depths=(2, 2, 1, 1), orders=(order,) * 4, num_classes=5, drop_path=0.4
    )
    model, images = lively(model).train(), torch.randn(4, 3, 64, 72)

    def logits(module, x):
        return (module(x),)

    truth = as_parts(monkeypatch, lambda: gradients(model, logits, images))
    found = gradients(model, logits, images)
    assert len(ran) == (0 if order == "release" else 12)
    assert_same(found, truth, 5e-4)
    model.use_checkpoint = True
    again = gradients(model, logits, images)
    assert all(torch.equal(again[name], value) for name, value in found.items())


def test_a_graph_that_is_kept_serves_twice_but_not_for_second_derivatives(ran):
    mixer, x = make_mixer("quadtree"), torch.randn(*SIZE, 8, requires_grad=True)
    out = mixer(x).square().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
    assert ran == ["Mixer"]


def test_copies_of_several_parameters_are_those_that_are_known_and_new_ones():
    wide, known, other = (torch.randn(3, requires_grad=True) for _ in range(3))
    params = wide, torch.randn(3).half().requires_grad_(), known, other
    with cast_together([known], params[1]):
        copies = cast_all(params, torch.half)
        assert copies[2] is cast(known, torch.half)
    assert all(torch.equal(copy, param.half()) for copy, param in zip(copies, params))
    assert not any(copy.requires_grad for copy in copies)


@interpreted
@pytest.mark.usefixtures("_range")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["raster", "quadtree"])
def test_interpreted_block(name, dtype, ran, monkeypatch):
    """The Triton kernels in the node, under Triton's interpreter."""
    for op in (selective_scan.route_ops.route_scan_fwd, selective_scan.route_ops.route_scan_bwd):
        monkeypatch.setitem(op.kernels, "cuda", op.kernels["cpu"])
    cuda = steps_of.__wrapped__("cuda")
    monkeypatch.setattr(predictor, "_takes_triton", lambda _: True)
    block, x = make_block(name), torch.randn(2, 4, 5, 8).to(dtype)
    fuse(monkeypatch)
    truth = as_parts(monkeypatch, lambda: gradients(block, block_call, x))
    for module in (kernels_block, kernels_mixer):
        monkeypatch.setattr(module, "steps_of", lambda _: cuda)
    assert_same(gradients(block, block_call, x), truth, 1e-4 if dtype == torch.float32 else 2e-2)
    assert ran == ["Block", "Mixer"]
