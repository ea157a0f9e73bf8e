"""Images in class folders, read by (epoch, index) so that a sample depends on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from quadmamba.data.erasing import Hole
from quadmamba.data.folders import notes, read_classes
from quadmamba.data.images import DataError, read_image, shown
from quadmamba.data.seeds import seeded
from quadmamba.data.transforms import Transform

_MAX_IN_A_ROW = 100
_HINT = "Repair or remove the file, or leave such images out with DATA.ON_ERROR skip."


class Sample(NamedTuple):
    """One item of `FolderImages`: bytes (h, w, 3), or None where the image is left out.

    hole: what random erasing takes from it.
    """

    image: Tensor | None
    target: int
    hole: Hole | None = None
    unreadable: tuple[str, ...] = ()
    error: str = ""


class Batch(NamedTuple):
    """Collated samples: bytes (b, h, w, 3) and targets (b,).

    Both are None where all were left out. holes: one an image.
    """

    images: Tensor | None
    targets: Tensor | None
    holes: list[Hole | None]
    unreadable: list[str]
    error: str


def collate(samples: Sequence[Sample], out: Tensor | None = None) -> Batch:
    """Stack the images that could be read; keep the names of the others and the first error.

    out: bytes (at least as many, h, w, 3) to whose begin the images go.
    """
    unreadable = [path for sample in samples for path in sample.unreadable]
    error = next((sample.error for sample in samples if sample.error), "")
    kept = [sample for sample in samples if sample.image is not None]
    if not kept:
        return Batch(None, None, [], unreadable, error)
    images = torch.stack(
        [sample.image for sample in kept], out=None if out is None else out[: len(kept)]
    )
    targets = torch.tensor([sample.target for sample in kept])
    holes = [sample.hole for sample in kept]
    return Batch(images, targets, holes, unreadable, error)


class FolderImages(Dataset[Sample]):
    """An image folder whose augmentation is seeded by (seed, epoch, index) alone.

    root: holds one sub-folder a class. on_error: `raise` puts an error into the sample of an
    unreadable image, `skip` leaves the image out, or takes the next readable one where `replace`.
    max_pixels: of an image that is read. unreadable: the files left out so far, kept by the loader
    in the main process. notes: what is left out of the folder, as lines to be said. on_replace:
    called with the number of each image that is about to be read instead of an unreadable one.
    tell: called with each folder before it is listed.
    Raises DataError for a missing folder, fewer than two classes and an empty class.
    """

    def __init__(
        self,
        root: Path,
        transform: Transform,
        *,
        seed: int,
        on_error: str,
        replace: bool,
        max_pixels: int,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        found = read_classes(root, tell)
        self.classes: list[str] = list(found.images)
        self.samples: list[tuple[str, int]] = [
            (path, number) for number, paths in enumerate(found.images.values()) for path in paths
        ]
        self.notes = list(notes(found))
        self.max_pixels = max_pixels
        self.transform = transform
        self.seed = seed
        self.on_error = on_error
        self.replace = replace
        self.unreadable: set[str] = set()
        self.on_replace: Callable[[int], object] = lambda _: None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: tuple[int, int]) -> Sample:
        epoch, index = draw
        unreadable: list[str] = []
        tries = min(_MAX_IN_A_ROW, len(self)) if self.replace else 1
        for offset in range(tries):
            number = (index + offset) % len(self)
            path, target = self.samples[number]
            if offset:
                self.on_replace(number)
            try:
                image = read_image(path, self.max_pixels)
            except DataError as error:
                unreadable.append(path)
                if self.on_error == "raise":
                    return Sample(None, target, None, tuple(unreadable), f"{error}\n{_HINT}")
                continue
            with seeded(self.seed, epoch, index):
                view = self.transform(image)
            return Sample(view.image, target, view.hole, tuple(unreadable))
        message = f"{tries} images in a row cannot be read, the first is {shown(unreadable[0])}"
        return Sample(None, target, None, tuple(unreadable), message if self.replace else "")
