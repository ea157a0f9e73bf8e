"""Nodes on a GPU: the numbers of their parts, no more memory, graphs, and compiled code."""

import contextlib

import pytest
import torch
from node_cases import (  # noqa: F401
    CALLS,
    MIXERS,
    _ran,
    as_parts,
    assert_same,
    block_call,
    first_call,
    gradients,
    make_block,
)

from quadmamba.models import QuadMamba
from quadmamba.utils.graphs import GraphedBackward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Of the norm of a tensor: sums of the gradients of the tokens are rounded once, not twice
TOLERANCES = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
WIDTHS = {"chain": 48, "layers": 192}  # of the predictor's two forms


def under(dtype):
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", MIXERS)
def test_the_same_numbers_as_the_parts(name, kind, dtype, ran, monkeypatch):
    make, call, expected = CALLS[kind]
    for width in WIDTHS.values():
        module, x = make(name, width).cuda(), torch.randn(4, 14, 19, width).cuda()
        with under(dtype):
            truth = as_parts(monkeypatch, lambda m=module, x=x: gradients(m, call, x))
            assert ran == []
            found = gradients(module, call, x)
            assert_same(found, truth, TOLERANCES[dtype])
            again = gradients(module, call, x)
            assert all(value is None or torch.equal(again[k], value) for k, value in found.items())
            assert ran == 2 * expected
            with torch.no_grad():
                torch.manual_seed(5)
                outputs = call(module, x)
        assert all(torch.equal(out, found[f"out{i}"]) for i, out in enumerate(outputs))
        ran.clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["raster", "quadtree"])
def test_in_half_precision_without_autocast(name, dtype, ran, monkeypatch):
    block, x = make_block(name, 48).cuda().to(dtype), torch.randn(4, 14, 19, 48).cuda().to(dtype)
    truth = as_parts(monkeypatch, lambda: gradients(block, block_call, x))
    assert_same(gradients(block, block_call, x), truth, TOLERANCES[dtype])
    assert ran == ["Block", "Mixer"]


def model_of(order, **kwargs):
    torch.manual_seed(0)
    kwargs = {"depths": (2, 2, 2, 2), "num_classes": 7, "drop_path": 0.2, **kwargs}
    model = QuadMamba((48, 96, 192, 384), orders=(order, order, "raster", "raster"), **kwargs)
    return model.cuda().train()


def logits(model, images):
    with torch.autocast("cuda", torch.float16):
        return (model(images),)


def logits_in_full(model, images):
    return (model(images),)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("order", ["quadtree", "window", "release"])
def test_the_whole_model(order, use_checkpoint, ran, monkeypatch):
    """In float32, since rounding of half precision is all that fresh predictors' gradients show."""
    model = model_of(order, use_checkpoint=use_checkpoint)
    images = torch.randn(4, 3, 96, 128).cuda()
    truth = as_parts(monkeypatch, lambda: gradients(model, logits_in_full, images))
    found = gradients(model, logits_in_full, images)
    assert len(ran) == (8 if order == "release" else 16) * (2 if use_checkpoint else 1)
    blocks = {name: value for name, value in truth.items() if "stages" in name or "out" in name}
    assert_same({name: found[name] for name in blocks}, blocks, 1e-3)


@pytest.mark.parametrize("order", ["quadtree", "window"])
def test_the_whole_model_in_half_precision(order, ran, monkeypatch):
    model, images = model_of(order), torch.randn(4, 3, 96, 128).cuda()
    outputs = []
    for call in (lambda run: as_parts(monkeypatch, run), lambda run: run()):
        torch.manual_seed(5)
        outputs.append(call(lambda: logits(model, images))[0].detach())
    assert len(ran) == 16
    assert (outputs[1] - outputs[0]).norm() <= 1e-3 * outputs[0].norm()


@pytest.mark.parametrize("order", ["quadtree", "raster"])
def test_memory(order, monkeypatch):
    """Bytes kept after a forward pass, and the peaks of passes with and without gradients.

    A node lets go of what it kept at its end, so that a training step may peak a little higher.
    """
    model, images = model_of(order), torch.randn(16, 3, 224, 224).cuda()

    def measure():
        for _ in range(2):  # the first one makes the maps
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            (out,) = logits(model, images)
            kept = torch.cuda.memory_allocated() - before
            out.float().square().sum().backward()
            trained = torch.cuda.max_memory_allocated() - before
            del out
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                logits(model, images)
            inferred = torch.cuda.max_memory_allocated() - before
        return kept, trained, inferred

    by_parts, node = as_parts(monkeypatch, measure), measure()
    limits = {"kept": 1.01, "training": 1.05, "inference": 1.02}
    for (what, limit), ours, theirs in zip(limits.items(), node, by_parts):
        mib = f"{ours / 2**20:.1f} MiB, by parts {theirs / 2**20:.1f}"
        assert ours <= limit * theirs, f"{what}: {mib}"


@pytest.mark.parametrize("order", ["quadtree", "raster"])
def test_in_a_cuda_graph(order, ran):
    model, images = model_of(order), torch.randn(4, 3, 96, 128).cuda()
    params = list(model.parameters())

    def loss(images):
        (out,) = logits(model, images)
        total = out.float().square().mean()
        total.backward()
        return total.detach()

    results, graphed = [], GraphedBackward(loss, params)
    for call in (graphed, graphed, loss):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        total = call(images).clone()
        results.append([total, *(param.grad.clone() for param in params)])
    assert ran
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, first, second, eager in zip(names, *results):
        if "stem" not in name and "downsamples" not in name:  # cuDNN's own convolutions
            assert torch.equal(first, second), name
        assert (first - eager).norm() <= 1e-2 * eager.norm() + 1e-6, name


@pytest.mark.parametrize("name", ["raster", "eval"])
def test_compiled_code_has_the_parts(name, ran, monkeypatch):
    torch._dynamo.reset()
    block, x = make_block(name, 48).cuda(), torch.randn(2, 8, 9, 48).cuda()
    compiled = torch.compile(first_call, fullgraph=True, backend="aot_eager")
    found = gradients(block, compiled, x)
    assert ran == []
    truth = as_parts(monkeypatch, lambda: gradients(block, first_call, x))
    assert_same(found, truth, 1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(ran, monkeypatch):
    block, x = make_block("quadtree", 48).to("cuda:1"), torch.randn(2, 8, 9, 48).to("cuda:1")
    with torch.autocast("cuda", torch.float16):
        truth = as_parts(monkeypatch, lambda: gradients(block, block_call, x))
        assert_same(gradients(block, block_call, x), truth, TOLERANCES[torch.float16])
    assert ran == ["Block", "Mixer"]
