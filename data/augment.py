"""timm's augmentation policies with repairs: posterize, and the speed of three kinds of operation.

Pillow's bicubic transform takes 16 taps a pixel for any matrix. Shear and translate move whole
lines along themselves, so that 4 taps do, in vector code, with Pillow's own weights. Sharpness
blurs by a filter of one constant and a sum over 3x3 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Compose

_BICUBIC, _BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
_ROUND = 2.0**-10  # Pillow cuts fractions off; this keeps 199.9999 at 200


def repair(transform: Compose) -> None:
    """Replace what is wrong or slow in the operations of a policy of timm, in place."""
    keep_a_bit(transform)
    for op in _operations(transform):
        op.aug_fn = _FASTER.get(op.name, op.aug_fn)


def keep_a_bit(transform: Compose) -> None:
    """Let posterize keep 1 bit: timm asks for 0 at its ends, which Pillow from 13 on refuses."""
    for op in _operations(transform):
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_at_least_one, op.level_fn)


def _operations(transform: Compose) -> Iterator:
    for step in transform.transforms:
        policy = [op for ops in getattr(step, "policy", ()) for op in ops]
        yield from getattr(step, "ops", policy)


def _at_least_one(level_fn: Callable[..., tuple[int]], level: float, hparams: dict) -> tuple[int]:
    return (max(1, level_fn(level, hparams)[0]),)


def slide(
    image: Image.Image, axis: int, moves: np.ndarray, *, resample: int, fillcolor: tuple[int, ...]
) -> Image.Image:
    """Read each line of an RGB image at its own distance: line i, pixel j comes from j + moves[i].

    axis: 1 moves rows along themselves, 0 columns. What lies outside the image is `fillcolor`.
    Equal to Pillow's transform by the matching matrix, but for a last bit in a few values.
    """
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    pixels = pixels.reshape(image.height, image.width)
    size = pixels.shape[axis]
    first = np.floor(moves).astype(np.int64)
    weights = _weights(moves - first, resample)
    along = np.arange(size + len(weights) - 1) + 1 - len(weights) // 2
    if axis == 0:
        source = (along[:, None] + first).clip(0, size - 1) * image.width + np.arange(image.width)
    else:
        rows = np.arange(image.height)[:, None] * image.width
        source = (along + first[:, None]).clip(0, size - 1) + rows
    moved = _weighted_sum(pixels.take(source), weights, axis)
    fill = np.array([*fillcolor, 255], np.uint8).view(np.uint32)
    np.copyto(moved, fill, where=_outside(moves, size, axis))
    return Image.frombytes("RGB", image.size, moved, "raw", "RGBX")


def _outside(moves: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Where j + 0.5 + move, the point that pixel j reads, is below 0 or not below `size`."""
    at = np.arange(size, dtype=np.int32)
    low, high = (np.ceil(edge - 0.5 - moves).astype(np.int32) for edge in (0, size))
    if axis == 0:
        return (at[:, None] < low) | (at[:, None] >= high)
    return (at < low[:, None]) | (at >= high[:, None])


def _weighted_sum(taps: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Sum of the neighbours along `axis` of pixels packed in 32 bits, weights (taps, lines)."""
    values = torch.from_numpy(taps.view(np.uint8)).float()  # (h, 4 w): four bytes a pixel
    factors = torch.from_numpy(weights.astype(np.float32))
    step = 1 if axis == 0 else 4
    # Along the rows of memory: an innermost loop over four bytes would be slow
    factors = factors.repeat_interleave(4, 1)[:, None] if axis == 0 else factors[:, :, None]
    size = values.shape[axis] - step * (len(weights) - 1)
    total = values.narrow(axis, 0, size).mul(factors[0]).add_(_ROUND)
    for k in range(1, len(weights)):
        total.addcmul_(values.narrow(axis, step * k, size), factors[k])
    # NumPy casts to bytes seven times as fast as torch
    return total.clamp_(0, 255).numpy().astype(np.uint8).view(np.uint32)


def _weights(d: np.ndarray, resample: int) -> np.ndarray:
    """Pillow's weights (taps, n) of the pixels around a point d behind one of them."""
    if resample == _BILINEAR:
        return np.stack([1 - d, d])
    if resample != _BICUBIC:
        raise ValueError(f"expected bicubic or bilinear resampling, got {resample}")
    d2, d3 = d * d, d * d * d
    return np.stack([-d + 2 * d2 - d3, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2])


def sharpness(image: Image.Image, factor: float, **_: object) -> Image.Image:
    """Pillow's ImageEnhance.Sharpness on an RGB image, to the bit."""
    pixels = np.array(image)
    values = pixels.reshape(image.height, 3 * image.width).astype(np.int16)
    if min(image.size) < 3:
        return image.copy()
    centre = values[1:-1, 3:-3]
    rows = values[:-2] + values[1:-1] + values[2:]
    total = rows[:, :-6] + rows[:, 3:-3] + rows[:, 6:] + 4 * centre
    blurred = (2 * total + 13) // 26  # total / 13, rounded
    change = (centre - blurred).astype(np.float32)
    change *= np.float32(factor)
    change += blurred
    inner = change.clip(0, 255).astype(np.uint8)  # the frame stays as it is
    pixels[1:-1, 1:-1] = inner.reshape(image.height - 2, image.width - 2, 3)
    return Image.fromarray(pixels)


def _shear(axis: int, image: Image.Image, factor: float, **fill: object) -> Image.Image:
    lines = image.size[axis]
    return slide(image, axis, factor * (np.arange(lines) + 0.5), **fill)


def _translate(axis: int, image: Image.Image, part: float, **fill: object) -> Image.Image:
    lines, size = image.size[axis], image.size[1 - axis]
    return slide(image, axis, np.full(lines, part * size), **fill)


# By timm's names; axis 1 are rows. PIL's size is (width, height): size[axis] counts the lines.
_FASTER = {
    "ShearX": partial(_shear, 1),
    "ShearY": partial(_shear, 0),
    "TranslateXRel": partial(_translate, 1),
    "TranslateYRel": partial(_translate, 0),
    "Sharpness": sharpness,
    "SharpnessIncreasing": sharpness,
}
