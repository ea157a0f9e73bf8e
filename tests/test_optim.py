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


def test_rates_scale_with_the_total_batch():
    cfg = load_cfg(opts=["DATA.BATCH_SIZE", "128", "TRAIN.ACCUM_STEPS", "2"])
    assert lr_scale(cfg, 4) == 128 * 2 * 4 / 512
    optimizer = build_optimizer(cfg, tagged("decay"), world_size=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * 2)
    assert lr_scale(load_cfg(opts=["TRAIN.LR_BATCH", "0"]), 4) == 1


def test_schedule_warms_up_then_falls_as_a_cosine():
    opts = ["TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "2", "TRAIN.LR_BATCH", "0"]
    cfg = load_cfg(opts=opts)
    optimizer = build_optimizer(cfg, tagged("decay"))
    scheduler = build_scheduler(cfg, optimizer, 5)
    rates = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 51):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    train = cfg.TRAIN
    span = train.BASE_LR - train.WARMUP_LR
    assert rates[:10] == pytest.approx([train.WARMUP_LR + span * i / 10 for i in range(10)])
    cosine = [
        train.MIN_LR + (train.BASE_LR - train.MIN_LR) * (1 + math.cos(math.pi * i / 40)) / 2
        for i in range(41)
    ]
    assert rates[10:] == pytest.approx(cosine)
