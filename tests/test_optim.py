"""The optimizer's groups by tag, the scaling of rates, and the schedule."""

import math

import pytest
import torch
from torch import nn

from quadmamba.configs import load_cfg
from quadmamba.models import build_model
from quadmamba.utils.optim import build_optimizer, build_scheduler, lr_scale

TINY = ["MODEL.DIMS", "[8,16,24,32]", "MODEL.DEPTHS", "[1,1,1,1]"]


def tagged(*tags):
    module = nn.Module()
    for i, tag in enumerate(tags):
        param = nn.Parameter(torch.zeros(2))
        if tag:
            param.decay = tag
        module.register_parameter(f"p{i}", param)
    return module


@pytest.mark.parametrize("decay_ssm", [False, True])
def test_each_parameter_of_a_model_is_in_its_group(decay_ssm):
    cfg = load_cfg(opts=[*TINY, "TRAIN.DECAY_SSM", str(decay_ssm)])
    model = build_model(cfg, 3)
    decayed, free = build_optimizer(cfg, model).param_groups
    assert decayed["weight_decay"] == cfg.TRAIN.WEIGHT_DECAY
    assert free["weight_decay"] == 0
    names = {id(param): name for name, param in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    names_free = {names[id(param)] for param in free["params"]}
    names_decayed = {names[id(param)] for param in decayed["params"]}
    assert "head.fc.weight" in names_decayed
    assert {"head.fc.bias", "head.norm.weight"} <= names_free
    for name, param in model.named_parameters():
        if param.decay == "ssm":
            assert (name in names_decayed) == decay_ssm


@pytest.mark.parametrize("tag", [None, "decayed"])
def test_a_parameter_without_a_known_tag_is_an_error(tag):
    with pytest.raises(ValueError, match="on parameter p1"):
        build_optimizer(load_cfg(), tagged("decay", tag))


def test_frozen_parameters_are_left_out():
    model = tagged("decay", "decay", "no_decay")
    model.p0.requires_grad_(False)
    groups = build_optimizer(load_cfg(), model).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_adamw_is_set_by_its_keys():
    opts = ["TRAIN.BETAS", "[0.8, 0.95]", "TRAIN.EPS", "1e-6", "TRAIN.WEIGHT_DECAY", "0.3"]
    optimizer = build_optimizer(load_cfg(opts=opts), tagged("decay", "no_decay", "ssm"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.95), 1e-6, True)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert type(optimizer) is torch.optim.AdamW


def test_a_step_is_adamw_by_hand():
    opts = ["TRAIN.LR_BATCH", "0", "TRAIN.BASE_LR", "0.01", "TRAIN.BETAS", "[0.8, 0.95]"]
    opts += ["TRAIN.EPS", "1e-3", "TRAIN.WEIGHT_DECAY", "0.3"]
    model, start = tagged("decay", "no_decay"), torch.tensor([1.0, -2.0])
    optimizer = build_optimizer(load_cfg(opts=opts), model)
    expected = [start.clone(), start.clone()]
    moments = [[torch.zeros(2), torch.zeros(2)] for _ in expected]
    for param in model.parameters():
        param.data.copy_(start)
    for step, grad in enumerate(torch.tensor([[0.1, -0.4], [0.3, 0.2]]), 1):
        for param, w, (m, v), decay in zip(model.parameters(), expected, moments, (0.3, 0.0)):
            param.grad = grad.clone()
            m.mul_(0.8).add_(0.2 * grad)
            v.mul_(0.95).add_(0.05 * grad**2)
            w.mul_(1 - 0.01 * decay)
            w.sub_(0.01 * m / (1 - 0.8**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-3))
        optimizer.step()
        for param, w in zip(model.parameters(), expected):
            torch.testing.assert_close(param.detach(), w)


def test_rates_scale_with_the_total_batch():
    cfg = load_cfg(
        opts=["DATA.BATCH_SIZE", "96", "TRAIN.ACCUM_STEPS", "2", "TRAIN.LR_BATCH", "256"]
    )
    assert lr_scale(cfg, 4) == 96 * 2 * 4 / 256 == 3
    assert lr_scale(cfg) == 0.75
    optimizer = build_optimizer(cfg, tagged("decay"), world_size=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * 3)
    assert lr_scale(load_cfg(opts=["TRAIN.LR_BATCH", "0"]), 4) == 1
    assert build_optimizer(cfg, tagged("decay")).param_groups[0]["lr"] == pytest.approx(5e-4 * 0.75)


@pytest.mark.parametrize(("lr_batch", "scale"), [(0, 1.0), (64, 6.0)])
def test_schedule_warms_up_then_falls_as_a_cosine(lr_batch, scale):
    """All three rates are scaled; the epochs of the warm-up are counted in the whole."""
    opts = ["TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "2", "TRAIN.LR_BATCH", str(lr_batch)]
    opts += ["TRAIN.BASE_LR", "1e-3", "TRAIN.WARMUP_LR", "1e-5", "TRAIN.MIN_LR", "2e-5"]
    cfg = load_cfg(opts=[*opts, "DATA.BATCH_SIZE", "128"])
    optimizer = build_optimizer(cfg, tagged("decay", "no_decay"), world_size=3)
    scheduler = build_scheduler(cfg, optimizer, 5, world_size=3)
    rates = []
    for update in range(53):
        if update:
            scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == rates[-1]
    warm = [scale * (1e-5 + (1e-3 - 1e-5) * i / 10) for i in range(10)]
    cosine = [
        scale * (2e-5 + (1e-3 - 2e-5) * (1 + math.cos(math.pi * i / 40)) / 2) for i in range(41)
    ]
    assert rates == pytest.approx([*warm, *cosine, scale * 2e-5, scale * 2e-5])


def test_a_run_without_warm_up_begins_at_the_full_rate():
    cfg = load_cfg(opts=["TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.LR_BATCH", "0"])
    optimizer = build_optimizer(cfg, tagged("decay"))
    scheduler = build_scheduler(cfg, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    scheduler.step_update(1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx((5e-4 + 5e-6) / 2)
