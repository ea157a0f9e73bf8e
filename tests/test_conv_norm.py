"""Stem and downsampling with a convolution's bias in the pass of the norm behind it."""

import pytest
import torch
from torch import nn

from quadmamba.models import layers
from quadmamba.models.layers import Downsample, Stem

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
CASES = {  # module, shape of its input, passes of a norm with a bias
    "stem": (lambda: Stem(3, 32), (2, 3, 17, 22), 2),
    "one-channel": (lambda: Stem(1, 48), (1, 1, 5, 4), 2),
    "downsample": (lambda: Downsample(16, 24), (2, 7, 9, 16), 1),
}


@pytest.fixture
def passes(monkeypatch):
    """The passes that were taken; the CPU takes them too."""
    seen = []
    inner = layers.bias_norm

    def bias_norm(*args):
        seen.append(args)
        return inner(*args)

    monkeypatch.setattr(layers, "bias_norm", bias_norm)
    monkeypatch.setattr(layers, "is_fused", lambda _: True)
    return seen


def make(name, device):
    torch.manual_seed(0)
    module, shape, count = CASES[name]
    module = module().to(device)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return module, torch.randn(shape, device=device).requires_grad_(), count


def gradients(module, x):
    y = module(x)
    torch.manual_seed(1)
    grads = torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))
    return [y.detach(), *grads]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_as_the_parts(name, device, passes):
    module, x, count = make(name, device)
    found = gradients(module, x)
    assert len(passes) == count
    hook = module[1].register_forward_hook(lambda *_: None)
    truth = gradients(module, x)
    assert len(passes) == count, "parts that somebody watches run by themselves"
    hook.remove()
    for a, b in zip(found, truth):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


REPLACED = {  # which part of the stem, and what takes its place
    "activation": (2, lambda _: nn.ReLU()),
    "tanh": (2, lambda _: nn.GELU(approximate="tanh")),
    "no bias": (3, lambda _: layers.GridConv2d(16, 32, 3, stride=2, padding=1, bias=False)),
    "dtype": (4, nn.Module.double),
}


@pytest.mark.parametrize("name", REPLACED)
def test_parts_of_other_kinds_run_by_themselves(name, passes):
    module, x, _ = make("stem", "cpu")
    index, replace = REPLACED[name]
    module[index] = replace(module[index])
    y = module(x)
    assert not passes
    assert torch.equal(y, nn.Sequential(*module)(x.permute(0, 2, 3, 1)))
