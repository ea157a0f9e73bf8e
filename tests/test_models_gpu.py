"""The model on a GPU, with the fused kernels, equals the model on the CPU in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from quadmamba.models import QuadMamba, from_release, quadtree, ss2d
from quadmamba.models.orders import ORDERS
from quadmamba.models.release import official_name
from quadmamba.utils.views import block_views
from tests.literal import literal_logits, official_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Error of a tensor relative to its norm: output and gradients
TOLERANCES = {
    torch.float32: (1e-4, 1e-3),
    torch.float16: (2e-2, 1e-1),
    torch.bfloat16: (1e-1, 4e-1),
}


def fixed_noise(x, dtype):
    """Noise that chooses another quadrant for each image, whatever the scores of fresh weights.

    These score all quadrants almost alike, so that two devices would choose differently.
    """
    images = torch.arange(len(x), device=x.device)
    return 1 - 0.9 * torch.eye(4, dtype=dtype, device=x.device)[images % 4]


def run(model, images, weight, amp):
    enabled = amp in (torch.float16, torch.bfloat16)
    with torch.autocast(images.device.type, amp if enabled else None, enabled=enabled):
        logits = model(images)
    (logits.to(weight.dtype) * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return logits.detach(), grads


def error(a, b):
    return ((a.double().cpu() - b).norm() / b.norm()).item()


def joined(grads, group):
    return torch.cat([g.cpu().flatten() for name, g in grads.items() if name.startswith(group)])


def group_of(name):
    """A parameter by itself, but the predictors' of a block together.

    The gradients of a softmax add up to nothing, so those of a predictor's biases are what rounding
    leaves of far larger ones.
    """
    return name.split("predictor")[0] + "predictor" if "predictor" in name else name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_gpu_equals_float64(order, dtype, monkeypatch):
    for module in (quadtree, ss2d):
        monkeypatch.setattr(module, "draw_noise", fixed_noise)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    orders = (order, order, "raster", "raster")
    model = QuadMamba((32, 48, 64, 96), depths=(2, 2, 1, 1), orders=orders, num_classes=7)
    images, weight = torch.randn(4, 3, 72, 100), torch.randn(4, 7)
    exact = run(copy.deepcopy(model).double().train(), images.double(), weight.double(), None)
    plain = run(copy.deepcopy(model).train(), images, weight, None)[1]  # on the CPU, in float32
    ours = run(model.cuda().train(), images.cuda(), weight.cuda(), dtype)
    for_output, for_grads = TOLERANCES[dtype]
    assert error(ours[0], exact[0]) <= for_output
    squares = [(error(ours[1][name], grad) * grad.norm()) ** 2 for name, grad in exact[1].items()]
    total = sum(grad.norm() ** 2 for grad in exact[1].values())
    assert (sum(squares) / total).sqrt().item() <= for_grads
    if dtype == torch.float32:
        for group in {group_of(name) for name in exact[1]}:
            true, found, usual = (joined(grads, group) for grads in (exact[1], ours[1], plain))
            assert error(found, true) <= for_grads + 2 * error(usual, true), group


@pytest.mark.parametrize("order", ORDERS)
def test_eval_twice_is_bit_identical(order):
    model = QuadMamba((32, 48, 64, 96), depths=(2, 2, 1, 1), orders=(order,) * 4).cuda().eval()
    images = torch.randn(4, 3, 96, 64, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        assert torch.equal(model(images), model(images))


def test_two_training_steps_are_bit_identical():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = QuadMamba((32, 48, 64, 96), depths=(2, 2, 1, 1)).cuda().train()
        images = torch.randn(4, 3, 96, 64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            model(images).float().square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        if "downsamples" not in name and "stem" not in name:  # cuDNN's own convolutions
            assert torch.equal(grad, results[1][name]), name


def test_official_weights_on_a_gpu_equal_the_literal_restatement(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    shape = {"dims": (32, 48, 64, 96), "depths": (2, 4, 1, 1), "quad": (True, True, False, False)}
    state = official_state(**shape, ratio=2.0, n=1, mlp_ratio=4.0, classes=7)
    torch.manual_seed(0)
    contrast = torch.tensor([[0.1, 0.5], [1.0, 3.0]]).repeat_interleave(32, 0)
    images = torch.randn(4, 3, 64, 96) * contrast.repeat_interleave(48, 1)
    weight = torch.randn(4, 7)
    model = from_release(state).eval()
    for view in block_views(copy.deepcopy(model).double(), images.double()):
        best = F.adaptive_avg_pool2d(view.score[:, None], 2).flatten(1).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "both devices choose alike"
    leaves = {key: v.double().requires_grad_() for key, v in state.items()}
    exact = literal_logits(leaves, images.double(), False)
    (exact * weight.double()).sum().backward()
    logits, grads = run(model.cuda(), images.cuda(), weight.cuda(), torch.float32)
    for_output, for_grads = TOLERANCES[torch.float32]
    assert ((logits.cpu() - exact.detach()).norm() / exact.norm()).item() <= for_output
    own = {official_name(name): grad for name, grad in grads.items() if grad is not None}
    assert own.keys() == {key for key, leaf in leaves.items() if leaf.grad is not None}
    for key, grad in own.items():
        wanted = leaves[key].grad
        error = (grad.cpu().reshape(wanted.shape) - wanted).norm() / wanted.norm()
        assert error.item() <= for_grads, key
