"""Cluttered digits in memory: grey canvases read once, batches cut on the device of the model.

For experiments that are too small to wait for a loader. Training canvases move by a few pixels from
epoch to epoch; the ImageNet augmentation of AUG plays no part.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from quadmamba.data.images import DataError, read_image

POSITIONS = "positions.csv"
_LARGEST = 2**24  # pixels of a canvas
_MOVE = 14  # a training canvas moves by up to a 14th of its side


@dataclass(frozen=True)
class Canvases:
    """Grey canvases of one part of the data on one device.

    images: (n, size, size) uint8. targets: (n) int64. centres: (n, 2) row and column of the digit's
    centre, as fractions of the side.
    """

    images: Tensor
    targets: Tensor
    centres: Tensor

    def to(self, device: torch.device) -> Canvases:
        """The same on another device."""
        return Canvases(*(t.to(device) for t in (self.images, self.targets, self.centres)))


class CanvasLoader:
    """Batches (images (b, 3, size, size), targets (b)) on the device of `canvases`, normalised.

    shuffle: a new order and new moves each epoch, from (seed, epoch) alone; the last batch is left
    out where it is not full. Otherwise all canvases as they are.
    """

    def __init__(self, canvases: Canvases, batch: int, *, shuffle: bool, seed: int = 0) -> None:
        self.canvases, self.batch, self.shuffle, self.seed = canvases, batch, shuffle, seed
        self.epoch = self.seen = 0
        size = canvases.images.shape[-1]
        self.margin = size // _MOVE if shuffle else 0
        self.padded = F.pad(canvases.images, [self.margin] * 4)
        mean, std = (
            torch.tensor(values, device=self.padded.device).view(3, 1, 1)
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        self.mean, self.scale = mean, 1 / (255 * std)

    @property
    def dataset(self) -> Tensor:
        """One entry for each canvas: its class."""
        return self.canvases.targets

    @property
    def sampler(self) -> CanvasLoader:
        """Where the engine announces an epoch: here."""
        return self

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Choose the order and the moves of the next pass, which leaves out its first `seen`."""
        self.epoch, self.seen = epoch, seen

    def __len__(self) -> int:
        count = len(self.canvases.targets) - self.seen
        return count // self.batch if self.shuffle else -(-count // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        targets = self.canvases.targets
        order = torch.arange(len(targets))
        moves = torch.zeros(len(targets), 2, dtype=torch.int64)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 2**20 + self.epoch)
            order = torch.randperm(len(targets), generator=generator)
            moves = torch.randint(2 * self.margin + 1, moves.shape, generator=generator)
        order, moves = (t[self.seen :].to(targets.device) for t in (order, moves))
        for first in range(0, len(self) * self.batch, self.batch):
            chosen = order[first : first + self.batch]
            yield self._images(chosen, moves[first : first + self.batch]), targets[chosen]

    def _images(self, chosen: Tensor, moves: Tensor) -> Tensor:
        side = torch.arange(self.canvases.images.shape[-1], device=chosen.device)
        rows, columns = moves[:, :1] + side, moves[:, 1:] + side  # (b, size)
        grey = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return (grey[:, None].float() - 255 * self.mean) * self.scale  # (b, 3, size, size)


def read_canvases(root: Path, part: str) -> Canvases:
    """The canvases of `part` ("train" or "val") in a folder of `tools/make_digits.py --cluttered`.

    Raises DataError where there is no such folder, or where a file or a position cannot be read.
    """
    table = root / POSITIONS
    if not table.is_file():
        raise DataError(
            f"no such file: {table}; make the data with\n"
            f"  python -m quadmamba.tools.make_digits {root} --cluttered --train 6000 --val 1440"
        )
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["file"].startswith(f"{part}/")]
    if not rows:
        raise DataError(f"{table}: expected canvases of {part}/, found none")
    size = int(rows[0]["size"])
    images = [_read_canvas(root / row["file"], size) for row in rows]
    centres = [[float(row[key]) / size for key in ("center_y", "center_x")] for row in rows]
    targets = [int(row["file"].split("/")[1]) for row in rows]
    return Canvases(torch.stack(images), torch.tensor(targets), torch.tensor(centres))


def _read_canvas(path: Path, size: int) -> Tensor:
    image = read_image(path, _LARGEST)[..., 0]
    if image.shape != (size, size):
        h, w = image.shape
        raise DataError(f"{path}: expected {size} x {size} pixels as in {POSITIONS}, got {w} x {h}")
    return image
