"""The numbers of the recipe beside the published ones: the paper's, the official code's, DeiT's."""

import pytest
import torch
from timm.data.mixup import Mixup

from quadmamba.configs import load_cfg
from quadmamba.configs.defaults import _C
from quadmamba.configs.load import get_key
from quadmamba.data import seeded
from quadmamba.data.loaders import _build_mixup
from quadmamba.utils.stepper import autocast, build_criterion

PUBLISHED = {  # the paper's Table 7 and appendix A.2, else config.py of the official code
    "MODEL.DIMS": [96, 192, 384, 768],
    "MODEL.DEPTHS": [2, 2, 5, 2],
    "MODEL.ORDERS": ["quadtree", "quadtree", "raster", "raster"],
    "MODEL.PARTITION": [2, 4],
    "MODEL.SELECTION": "predictor",
    "MODEL.SHIFT": True,
    "MODEL.SHIFT_DIRECTIONS": 4,
    "MODEL.SSM_RATIO": 2.0,
    "MODEL.D_STATE": 1,
    "MODEL.MLP_RATIO": 4.0,
    "MODEL.DROP_PATH": 0.1,
    "MODEL.TAU": 1.0,
    "MODEL.GUMBEL": True,
    "DATA.IMG_SIZE": 224,
    "DATA.BATCH_SIZE": 128,
    "DATA.WORKERS": 8,
    "DATA.PIN_MEMORY": True,
    "DATA.INTERPOLATION": "bicubic",
    "DATA.CROP_RATIO": 0.875,
    "AUG.SCALE": [0.08, 1.0],
    "AUG.HFLIP": 0.5,
    "AUG.COLOR_JITTER": 0.4,
    "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "AUG.REPROB": 0.25,
    "AUG.REMODE": "pixel",
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.MIXUP_PROB": 1.0,
    "AUG.MIXUP_SWITCH_PROB": 0.5,
    "TRAIN.EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.BASE_LR": 5e-4,
    "TRAIN.LR_BATCH": 512,
    "TRAIN.WARMUP_LR": 5e-7,
    "TRAIN.MIN_LR": 5e-6,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.BETAS": [0.9, 0.999],
    "TRAIN.EPS": 1e-8,
    "TRAIN.CLIP_GRAD": 5.0,
    "TRAIN.ACCUM_STEPS": 1,
    "TRAIN.LABEL_SMOOTHING": 0.1,
    "TRAIN.AMP": "fp16",
    "TRAIN.EMA": True,
    "TRAIN.EMA_DECAY": 0.9999,
    "TRAIN.SEED": 0,
}
OURS = {  # what no publication has
    "MODEL.NAME": "quadmamba_small",
    "MODEL.NUM_CLASSES": 0,
    "MODEL.WINDOW": 7,
    "MODEL.USE_CHECKPOINT": False,
    "DATA.PATH": "",
    "DATA.ON_ERROR": "raise",
    "DATA.TIMEOUT": 300.0,
    "DATA.MAX_PIXELS": 80_000_000,
    "TRAIN.DECAY_SSM": False,
    "TRAIN.MAX_BAD_STEPS": 10,
    "TRAIN.COMPILE": "off",
    "TRAIN.SYNC_BN": False,
    "TRAIN.SAVE_EVERY": 1,
    "TRAIN.SAVE_MINUTES": 10.0,
    "TRAIN.KEEP": 2,
    "TRAIN.EVAL_EVERY": 1,
    "TRAIN.AUTO_RESUME": True,
    "TRAIN.RESUME": "",
    "TRAIN.PRETRAINED": "",
    "MODE": "train",
    "DEVICE": "auto",
    "RANK_TIMEOUT": 10.0,
    "OUTPUT": "output",
    "TAG": "default",
    "LOG_EVERY": 10,
    "LOG_IMAGES": 4,
    "LOG_IMAGES_EVERY": 10,
}


def test_the_defaults_are_the_published_ones():
    expected = {**PUBLISHED, **OURS}
    defaults = {key: get_key(_C, key) for key in expected}
    assert defaults == expected
    assert all(type(defaults[key]) is type(value) for key, value in expected.items())
    assert _C.DATA.BATCH_SIZE * 8 / _C.TRAIN.LR_BATCH * _C.TRAIN.BASE_LR == 1e-3  # A.2, at 1024
    assert _C.DATA.IMG_SIZE / _C.DATA.CROP_RATIO == 256


# ------------------------------------------------------------------------------ mixup and cutmix
def mixed(seed, **flags):
    """Images of one value each, 1 to 8, and their targets, after the mixing of a configuration."""
    flags = {f"AUG.{key}": value for key, value in flags.items()} | {"DATA.BATCH_SIZE": 8}
    mixup = _build_mixup(load_cfg(flags=flags), 8)
    images = torch.arange(1.0, 9).view(8, 1, 1, 1).repeat(1, 3, 32, 32)
    with seeded(seed):
        return mixup(images, torch.arange(8))


def test_mixup_blends_and_cutmix_pastes():
    own, other = torch.arange(1.0, 9), torch.arange(1.0, 9).flip(0)
    blended = pasted = 0
    for seed in range(20):
        images, targets = mixed(seed, CUTMIX=0.0)
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images)), "blends alone"
        blended += not torch.allclose(images[:, 0, 0, 0], own)
        share = (images[0, 0, 0, 0] - 8) / (1 - 8)
        expected = share * torch.eye(8) + (1 - share) * torch.eye(8).flip(0)
        torch.testing.assert_close(targets, 0.9 * expected + 0.1 / 8, rtol=0, atol=1e-5)
        images, _ = mixed(seed, MIXUP=0.0)
        for image, first, second in zip(images, own, other):
            assert set(image.unique().tolist()) <= {first.item(), second.item()}, "pastes alone"
        pasted += len(images[0].unique()) == 2
    assert blended > 10
    assert pasted > 10


def test_mixing_is_set_by_its_keys():
    flags = {"AUG.MIXUP": 0.3, "AUG.CUTMIX": 0.6, "AUG.MIXUP_PROB": 0.7}
    flags |= {"AUG.MIXUP_SWITCH_PROB": 0.2, "TRAIN.LABEL_SMOOTHING": 0.05, "DATA.BATCH_SIZE": 4}
    mixup = _build_mixup(load_cfg(flags=flags), 11)
    expected = Mixup(0.3, 0.6, prob=0.7, switch_prob=0.2, label_smoothing=0.05, num_classes=11)
    assert vars(mixup) == vars(expected)
    assert mixup.mode == "batch"


# ---------------------------------------------------------------------------- precision and loss
def test_autocast_takes_the_type_of_its_name_on_gpus_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "autocast", lambda kind, **keys: seen.append((kind, keys)))
    for amp in ("bf16", "fp16", "off"):
        for device in ("cuda:1", "cpu"):
            autocast(torch.device(device), amp)
    off = {"dtype": None, "enabled": False}
    assert seen == [
        ("cuda", {"dtype": torch.bfloat16, "enabled": True}),
        ("cpu", off),
        ("cuda", {"dtype": torch.float16, "enabled": True}),
        ("cpu", off),
        ("cuda", off),
        ("cpu", off),
    ]


def test_the_criterion_smooths_labels_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([0, 2])
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    plain = -log_p[[0, 1], targets]
    smooth = 0.7 * plain - 0.3 * log_p.mean(1)
    found = build_criterion(mixed=False, label_smoothing=0.3)(logits, targets)
    assert found.item() == pytest.approx(smooth.mean().item())
    soft = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = build_criterion(mixed=True, label_smoothing=0.3)(logits, soft)
    assert found.item() == pytest.approx(-(soft * log_p).sum(1).mean().item())
