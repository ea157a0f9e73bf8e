"""From the bytes (h, w, 3) of an image of any size to those of a square one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import Compose
from yacs.config import CfgNode

from quadmamba.data.augment import repair
from quadmamba.data.erasing import Hole, draw_hole

_LONGEST = 16  # a longer strip, by its shorter side, is not resized as a whole


class View(NamedTuple):
    """What a transform makes of an image: bytes (size, size, 3), and what is to be erased."""

    image: Tensor
    hole: Hole | None = None


Transform = Callable[[Tensor], View]


class Transforms(NamedTuple):
    """Bytes (h, w, 3) to (IMG_SIZE, IMG_SIZE, 3), for training (random) and for validation."""

    train: Transform
    val: Transform


def build_transforms(cfg: CfgNode) -> Transforms:
    """The DeiT augmentation of cfg.AUG, and a resize with a centre crop of cfg.DATA.

    Small images are enlarged. Normalisation and the filling of erased areas are the prefetcher's.
    """
    aug, size, interpolation = cfg.AUG, cfg.DATA.IMG_SIZE, cfg.DATA.INTERPOLATION
    _, colours, _ = create_transform(
        size,
        is_training=True,
        color_jitter=aug.COLOR_JITTER or None,
        auto_augment=aug.AUTO_AUGMENT or None,
        interpolation=interpolation,
        separate=True,
    )
    repair(colours)
    train = TrainTransform(
        size,
        scale=tuple(aug.SCALE),
        hflip=aug.HFLIP,
        colours=colours,
        reprob=aug.REPROB,
        interpolation=interpolation,
    )
    return Transforms(train, ValTransform(size, cfg.DATA.CROP_RATIO, interpolation))


class TrainTransform:
    """Random resized crop, flip, what `colours` does to a Pillow image, and a hole to erase.

    scale: area of the crop, as fractions of the image. hflip, reprob: probabilities.
    """

    ratio = 3 / 4, 4 / 3  # of width to height of the crop

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float],
        hflip: float,
        colours: Compose,
        reprob: float,
        interpolation: str,
    ) -> None:
        self.size = size
        self.scale = scale
        self.hflip = hflip
        self.colours = colours
        self.reprob = reprob
        self.interpolation = interpolation

    def __call__(self, image: Tensor) -> View:
        top, left, h, w = RandomResizedCropAndInterpolation.get_params(
            image.permute(2, 0, 1), self.scale, self.ratio
        )
        h, w = max(1, h), max(1, w)  # timm rounds to 0 where a side is a few pixels
        top, left = min(top, image.shape[0] - h), min(left, image.shape[1] - w)
        crop = image[top : top + h, left : left + w]
        view = resize(crop, (self.size, self.size), self.interpolation)
        if self.hflip and random.random() < self.hflip:
            view = view.flip(1)
        if self.colours.transforms:
            view = to_bytes(self.colours(Image.fromarray(view.numpy())))
        return View(view, draw_hole(self.size, self.reprob))


class ValTransform:
    """Resize the shorter side to size / crop_ratio, then take the centre."""

    def __init__(self, size: int, crop_ratio: float, interpolation: str) -> None:
        self.size = size
        self.short = math.floor(size / crop_ratio)
        self.interpolation = interpolation

    def __call__(self, image: Tensor) -> View:
        h, w = image.shape[:2]
        longer = int(self.short * max(h, w) / min(h, w))
        h, w = (self.short, longer) if h <= w else (longer, self.short)
        top, left = round((h - self.size) / 2), round((w - self.size) / 2)
        if longer > _LONGEST * self.short:
            return View(self._centre_of_strip(image, (h, w), (top, left)))
        resized = resize(image, (h, w), self.interpolation)
        return View(resized[top : top + self.size, left : left + self.size])

    def _centre_of_strip(
        self, image: Tensor, size: tuple[int, int], corner: tuple[int, int]
    ) -> Tensor:
        """What a crop at `corner` of the image resized to `size` holds, made from that part alone.

        Pillow resamples a part as it would the whole, which for a strip may be too much to hold.
        """
        edges = []  # of the part in pixels of the image, and of a larger one with all that is read
        for side, resized, first in zip(image.shape[:2], size, corner):
            scale = side / resized
            low, high = first * scale, (first + self.size) * scale
            margin = 3 * math.ceil(max(1, scale))
            start = max(0, math.floor(low) - margin)
            edges.append((low - start, high - start, start, min(side, math.ceil(high) + margin)))
        (top, bottom, y0, y1), (left, right, x0, x1) = edges
        part = Image.fromarray(image[y0:y1, x0:x1].numpy())
        resample = Image.Resampling[self.interpolation.upper()]
        square = (self.size, self.size)
        return to_bytes(part.resize(square, resample, box=(left, top, right, bottom)))


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resample bytes (h, w, 3) with antialiasing as Pillow does, equal but for one level in 0.5 %.

    Rows first where only they become fewer: the order shows, as overshoots are cut off in between.
    """
    batch = image[None].permute(0, 3, 1, 2)  # channels last in memory, which torch does fastest
    steps = [size]
    if image.shape[0] > size[0] and image.shape[1] <= size[1]:
        steps.insert(0, (size[0], image.shape[1]))
    for step in steps:
        batch = interpolate(batch, step, mode=interpolation, antialias=True)
    return batch.permute(0, 2, 3, 1)[0].contiguous()  # copies where both sides are as they were


def to_bytes(image: Image.Image) -> Tensor:
    """The pixels (h, w, 3) of an RGB image."""
    return torch.from_numpy(np.array(image))
