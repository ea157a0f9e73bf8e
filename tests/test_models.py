"""The model: size, determinism, gradients, feature maps, initialisation, imports."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quadmamba.configs import load_cfg
from quadmamba.models import QuadMamba, build_model, layers, quadmamba, quadtree, ss2d
from quadmamba.models.orders import ORDERS
from quadmamba.utils.complexity import report

ROOT = Path(__file__).parent.parent
YAMLS = sorted((ROOT / "configs").glob("*.yaml"))
GOLDEN = json.loads((ROOT / "tests/golden/complexity.json").read_text())
PAPER = {  # parameters in M and multiply-adds in G, as published or derived from the publication
    "quadmamba_lite": (5.47, 0.82),
    "quadmamba_tiny": (10.32, 2.07),
    "quadmamba_small": (31.25, 5.52),
    "quadmamba_base": (50.69, 9.38),
    "vmamba_tiny": (30.71, 4.86),
    "vmamba_small": (50.15, 8.72),
}


def tiny(order="quadtree", **kwargs):
    kwargs = {"orders": (order,) * 4, "num_classes": 5, "ssm_ratio": 1.0, **kwargs}
    return QuadMamba((8, 8, 12, 16), depths=(2, 2, 1, 1), **kwargs)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_parameters_and_multiply_adds_are_the_golden_ones(path):
    cfg = load_cfg(path)
    counted = report(build_model(cfg), cfg.DATA.IMG_SIZE)
    golden = GOLDEN[path.stem]
    assert counted.params == golden["params"]
    assert round(counted.gmacs * 1e9) == golden["macs_fvcore_plus_9bldn_plus_bdl"]
    assert counted.img_size == golden["img_size"]
    assert sum(params for params, _ in counted.parts.values()) == counted.params
    assert sum(gmacs for _, gmacs in counted.parts.values()) == pytest.approx(counted.gmacs)
    if path.stem in PAPER:
        params, gmacs = PAPER[path.stem]
        assert counted.params / 1e6 == pytest.approx(params, abs=0.006)
        assert counted.gmacs == pytest.approx(gmacs, abs=0.006)


def test_counting_leaves_the_model_alone():
    model = tiny().train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    small, large = report(model, 32), report(model, 64)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert large.gmacs == pytest.approx(4 * small.gmacs, rel=0.01)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(1, 1), (9, 70), (64, 32), (57, 33)])
def test_feature_maps_of_any_size_are_contiguous(order, size):
    model = tiny(order).eval()
    with torch.no_grad():
        maps = model.forward_features(torch.randn(2, 3, *size))
    assert len(maps) == 4
    for grid, channels, stride in zip(maps, (8, 8, 12, 16), (4, 8, 16, 32)):
        assert grid.shape == (2, channels, *(math.ceil(side / stride) for side in size))
        assert grid.is_contiguous()
        assert grid.isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
def test_eval_twice_is_bit_identical_and_training_is_noisy_only_where_it_should(order):
    torch.manual_seed(0)
    model, image = tiny(order), torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(image), model(image))
        same = torch.equal(model.train()(image), model(image))
    assert same == (order in ("raster", "window"))


@pytest.mark.parametrize("order", ["quadtree", "release"])
def test_an_image_does_not_depend_on_its_batch(order):
    model, images = tiny(order).double().eval(), torch.randn(3, 3, 36, 52).double()
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=0, atol=1e-12)


class SoftSurrogate:
    """`select_quadrant` with the straight-through estimate made exact: hard(0) + soft - soft(0).

    Its plain derivative is what the estimator promises, so finite differences can test it.
    """

    def __init__(self):
        self.offsets, self.call, self.record = [], 0, True

    def __call__(self, logits, tau, training, gumbel):
        assert training
        assert gumbel
        gumbel = -torch.empty_like(logits).exponential_().log()
        soft = ((logits + gumbel) / tau).softmax(-1)
        if self.record:
            hard = torch.nn.functional.one_hot(soft.argmax(-1), 4).to(soft.dtype)
            self.offsets.append((hard - soft).detach())
        self.call += 1
        return soft + self.offsets[(self.call - 1) % len(self.offsets)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_gradient_agrees_with_finite_differences(order, monkeypatch):
    torch.manual_seed(1)
    model = tiny(order, d_state=2, tau=0.7).double().train()
    image, weight = torch.randn(2, 3, 32, 40).double(), torch.randn(2, 5).double()

    def loss():
        torch.manual_seed(2)
        return (model(image) * weight).sum()

    loss().backward()
    surrogate = SoftSurrogate()
    monkeypatch.setattr(quadtree, "select_quadrant", surrogate)
    eps = 1e-6
    with torch.no_grad():
        loss()
        surrogate.record = False
        for name, param in model.named_parameters():
            direction = torch.randn_like(param)
            values = []
            for step in (eps, -2 * eps):
                param.add_(step * direction)
                values.append(loss())
            param.add_(eps * direction)
            numeric = (values[0] - values[1]) / (2 * eps)
            analytic = (param.grad * direction).sum()
            assert numeric.item() == pytest.approx(analytic.item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("order", ORDERS)
def test_the_fused_ops_make_the_same_model(order, monkeypatch):
    """As on a GPU, with the CPU implementations of the ops."""
    model, image = tiny(order, drop_path=0.5).train(), torch.randn(4, 3, 40, 48)
    results = []
    for fused in (False, True):
        for module in (layers, quadmamba, quadtree, ss2d):
            monkeypatch.setattr(module, "is_fused", lambda _x, fused=fused: fused)
        torch.manual_seed(3)
        logits = model(image)
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append((logits.detach(), *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["quadtree", "release"])
def test_the_predictor_learns(order):
    torch.manual_seed(0)
    model = tiny(orders=(order, order, "raster", "raster")).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, param in model.named_parameters():
        assert param.grad.abs().sum() > 0, name


def test_recomputed_blocks_draw_the_same_noise():
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        model, calls = tiny(drop_path=0.3, use_checkpoint=use_checkpoint).train(), []
        model.stages[1][0].norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(torch.randn(4, 3, 64, 64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == 1 + use_checkpoint, "computed again in the backward pass"
        with torch.no_grad():
            model.eval()(torch.randn(1, 3, 64, 64))
        assert len(calls) == 2 + use_checkpoint
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_drop_path_drops_samples_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    model = tiny(drop_path=rate).train()
    scales = model._drop_path_scales(4000)
    assert len(scales) == 6
    if rate == 0:
        assert scales == [(None, None)] * 6
        return
    for i, pair in enumerate(scales):
        keep = 1 - rate * i / 5
        for scale in pair:
            kept = scale[scale > 0]
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / max(keep, 1e-6)))
            assert scale.count_nonzero() / 4000 == pytest.approx(keep, abs=0.03)
    assert not torch.equal(*scales[3]), "mixer and MLP are dropped independently"
    assert model.eval()._drop_path_scales(4) == [(None, None)] * 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_dropped_sample_passes_a_block_unchanged(fused, monkeypatch):
    monkeypatch.setattr(layers, "is_fused", lambda _: fused)  # as on a GPU
    model = tiny().eval()
    x, block = torch.randn(2, 4, 4, 8), model.stages[0][0]
    scale = torch.tensor([0.0, 2.0])
    total, branch = block(x, None, (scale, scale))
    total = layers.add(total, branch)
    assert torch.equal(total[0], x[0])
    after_op = x + 2 * block.op(block.norm(x, None)[1])
    truth = after_op + 2 * block.mlp(block.norm2(after_op, None)[1])
    torch.testing.assert_close(total[1], truth[1])


@pytest.mark.parametrize("order", ORDERS)
def test_inference_mode_leaves_nothing_behind_that_spoils_training(order):
    model = tiny(order)
    with torch.inference_mode():
        model(torch.randn(1, 3, 44, 68))
    model(torch.randn(1, 3, 44, 68)).sum().backward()


def test_fake_tensors_leave_nothing_behind():
    model, images = tiny().eval(), torch.randn(1, 3, 52, 76)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(images)
    assert type(model(images)) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_gives_empty_logits(dtype):
    model = tiny().to(dtype).eval()
    assert model(torch.zeros(0, 3, 32, 32, dtype=dtype)).shape == (0, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tau": 0.0}, "expected a temperature tau above 0"),
        ({"selection": "best"}, "selection: expected one of predictor, random, first, got 'best'"),
        ({"order": "window", "window": 0}, "expected a side of at least 1 token"),
        ({"ssm_ratio": 0.25}, "expected at least 4 inner channels, got 2"),
    ],
)
def test_impossible_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected images \(b, 3, H, W\), got \(2, 1, 8, 8\)"):
        tiny()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="expected 4 dims, depths and orders, got 3, 4 and 4"):
        QuadMamba((8, 8, 8), depths=(1, 1, 1, 1))


def test_import_and_inference_need_no_triton_no_extension_no_gpu():
    code = """
import sys
for name in ("triton", "selective_scan"):
    sys.modules[name] = None
import torch, quadmamba
torch.cuda.is_available = lambda: False
model = quadmamba.QuadMamba((8, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=3).eval()
print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.stdout.strip() == "(1, 3)", run.stderr
