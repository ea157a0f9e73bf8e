"""From a PIL image to a normalised tensor (3, h, w)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose
from yacs.config import CfgNode

Transform = Callable[[Image.Image], Tensor]


class Transforms(NamedTuple):
    """Image to tensor (3, IMG_SIZE, IMG_SIZE), for training (random) and for validation."""

    train: Transform
    val: Transform


def build_transforms(cfg: CfgNode) -> Transforms:
    """The DeiT augmentation of cfg.AUG, and a resize with a centre crop of cfg.DATA.

    Both normalise by ImageNet's mean and standard deviation. Small images are enlarged.
    """
    aug, size, interpolation = cfg.AUG, cfg.DATA.IMG_SIZE, cfg.DATA.INTERPOLATION
    train = create_transform(
        size,
        is_training=True,
        scale=tuple(aug.SCALE),
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT or None,
        interpolation=interpolation,
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
    )
    _keep_a_bit(train)
    val = create_transform(size, interpolation=interpolation, crop_pct=cfg.DATA.CROP_RATIO)
    return Transforms(train, val)


def _keep_a_bit(transform: Compose) -> None:
    """Let posterize keep 1 bit: timm asks for 0 at its ends, which Pillow from 13 on refuses."""
    for step in transform.transforms:
        policy = [op for ops in getattr(step, "policy", ()) for op in ops]
        for op in getattr(step, "ops", policy):
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_at_least_one, op.level_fn)


def _at_least_one(level_fn: Callable[..., tuple[int]], level: float, hparams: dict) -> tuple[int]:
    return (max(1, level_fn(level, hparams)[0]),)
