"""Random erasing in two halves: where is drawn with the sample, what is filled in on the device.

timm's RandomErasing does both at once from the global generators; here the place and the seed of
the noise belong to the sample, so that neither the batch nor the device has a say in them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_AREA = 0.02, 1 / 3  # of the image, as in timm
_ASPECT = 0.3, 1 / 0.3
_TRIES = 10


class Hole(NamedTuple):
    """A rectangle to erase from one image, and the seed of what fills it."""

    top: int
    left: int
    height: int
    width: int
    seed: int


def draw_hole(size: int, probability: float) -> Hole | None:
    """A hole in an image of `size` squared with this probability, from Python's generator."""
    if random.random() >= probability:
        return None
    for _ in range(_TRIES):
        area = random.uniform(*_AREA) * size * size
        aspect = math.exp(random.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if height < size and width < size:
            top, left = random.randint(0, size - height), random.randint(0, size - width)
            return Hole(top, left, height, width, random.getrandbits(63))
    return None


def erase(images: Tensor, holes: Sequence[Hole | None], mode: str) -> Tensor:
    """Fill the holes of normalised images (b, 3, h, w) in place, each from its own seed.

    mode: `pixel` fills with normal noise, `rand` with one normal colour, `const` with zero, which
    is the mean colour.
    """
    generator = torch.Generator(images.device)
    for number, hole in enumerate(holes):
        if hole is None:
            continue
        top, left, height, width, seed = hole
        area = images[number, :, top : top + height, left : left + width].permute(1, 2, 0)
        if mode == "const":
            area.zero_()
            continue
        shape = (height, width, 3) if mode == "pixel" else (1, 1, 3)
        generator.manual_seed(seed)
        area.copy_(torch.randn(shape, generator=generator, device=images.device))
    return images
