"""Mixers and blocks for the tests of nodes, and what they give."""

import pytest
import torch

from quadmamba.kernels import nodes, selective_scan
from quadmamba.kernels.fused.launch import compute_dtype
from quadmamba.models import layers, plain, quadmamba, quadtree, ss2d
from quadmamba.models.orders import QuadtreeOrder, build_order
from quadmamba.models.quadmamba import Block
from quadmamba.models.ss2d import SS2D, QuadSS2D

needs_kernels = pytest.mark.skipif(
    "cpu" not in selective_scan.route_ops.KERNELS, reason="needs the compiled kernels"
)
QUADTREE = QuadtreeOrder()
MIXERS = {  # name: class, arguments, whether in training mode
    "raster": (SS2D, {"order": build_order("raster"), "d_state": 2}, True),
    "window": (SS2D, {"order": build_order("window", 3)}, True),
    "quadtree": (QuadSS2D, {"order": QUADTREE, "tau": 0.7}, True),
    "shifted": (QuadSS2D, {"order": QUADTREE, "sign": (1, -1)}, True),
    "no-noise": (QuadSS2D, {"order": QUADTREE, "gumbel": False}, True),
    "eval": (QuadSS2D, {"order": QUADTREE, "sign": (-1, -1)}, False),
    "random": (QuadSS2D, {"order": QUADTREE, "selection": "random"}, True),
    "random-eval": (QuadSS2D, {"order": QUADTREE, "selection": "random"}, False),
    "first": (QuadSS2D, {"order": QUADTREE, "selection": "first"}, True),
    "one-level": (QuadSS2D, {"order": QuadtreeOrder((2, 2))}, True),
}
SIZE = (3, 8, 11)  # images, rows, columns


def make_mixer(name, dim=8):
    kind, kwargs, training = MIXERS[name]
    torch.manual_seed(0)
    return lively(kind(dim, **kwargs)).train(training)


def make_block(name, dim=8):
    return lively(Block(dim, op=make_mixer(name, dim), mlp_ratio=2.0)).train(MIXERS[name][2])


def lively(module):
    """Weights of a trained module's size: fresh ones leave scores and gates almost alike."""
    with torch.no_grad():
        for param in module.parameters():
            fan = max(8, param[0].numel()) if param.dim() > 1 else 8
            param.add_(0.3 * (8 / fan) ** 0.5 * torch.randn_like(param))
    return module


@pytest.fixture(name="ran")
def _ran(monkeypatch):
    """Switches nodes on for the CPU too; the names of those that run, in order."""
    seen = []
    monkeypatch.setattr(plain, "DEVICES", {"cpu", "cuda"})
    for owner in (nodes.Mixer, nodes.Block):
        inner = owner.forward

        def forward(self, inputs, saved, inner=inner):
            seen.append(type(self).__name__)
            return inner(self, inputs, saved)

        monkeypatch.setattr(owner, "forward", forward)
    return seen


def fuse(monkeypatch):
    """The parts run as on a GPU, by their fused ops."""
    for module in (layers, quadmamba, quadtree, ss2d):
        monkeypatch.setattr(module, "is_fused", lambda _: True)


def as_parts(monkeypatch, call):
    """What `call` returns where no node runs."""
    with monkeypatch.context() as patch:
        patch.setattr(plain, "DEVICES", set())
        return call()


def mixer_call(mixer, x):
    return (mixer(x),)


def block_call(block, x):
    """A block within a stage, with drop path on both branches."""
    branch, scale = (0.5 * x.flip(1)).to(compute_dtype(x)), 0.8 * torch.arange(len(x)).to(x.device)
    x, (values, last) = block(x, (branch, scale), (scale.flip(0), scale))
    assert last is scale
    return x, values


def first_call(block, x):
    """The first block of a stage, without drop path."""
    x, (values, _) = block(x, None, (None, None))
    return x, values


CALLS = {
    "mixer": (make_mixer, mixer_call, ["Mixer"]),
    "block": (make_block, block_call, ["Block", "Mixer"]),
    "first": (make_block, first_call, ["Block", "Mixer"]),
}


def gradients(module, call, x):
    """Outputs and gradients by name, None where there is none; with one seed."""
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    outputs = call(module, x)
    torch.manual_seed(6)
    sum((out.float() * torch.randn(out.shape).to(out.device)).sum() for out in outputs).backward()
    grads = {name: param.grad for name, param in module.named_parameters()}
    return {**{f"out{i}": o.detach() for i, o in enumerate(outputs)}, "x": x.grad, **grads}


def assert_same(found, truth, tolerance):
    """Equal up to a share of each tensor's norm; of a predictor's gradients that of all together.

    The gradients of a softmax add up to nothing, so those of its biases are small by cancelling.
    """
    assert found.keys() == truth.keys()
    errors, norms = {}, {}
    for name, value in truth.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            group = "predictor" if "predictor" in name else name
            square = (found[name].double() - value.double()).square().sum().item()
            errors[group] = errors.get(group, 0.0) + square
            norms[group] = norms.get(group, 0.0) + value.double().square().sum().item()
    for group, square in errors.items():
        assert square <= tolerance**2 * norms[group], f"{group}: {(square / norms[group]) ** 0.5}"
