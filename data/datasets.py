"""Images in class folders, read by (epoch, index) so that a sample depends on nothing else."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.io import decode_jpeg

from quadmamba.data.erasing import Hole
from quadmamba.data.seeds import seeded
from quadmamba.data.transforms import Transform, to_bytes

# What Pillow raises for a file that is missing, cut short, damaged or no image
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_JPEG = b"\xff\xd8\xff"
_MAX_IN_A_ROW = 100
_HINT = "Repair or remove the file, or leave such images out with DATA.ON_ERROR skip."


class DataError(Exception):
    """Data that cannot be used: the message says what was expected, what came and what to do."""


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


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack the images that could be read; keep the names of the others and the first error."""
    unreadable = [path for sample in samples for path in sample.unreadable]
    error = next((sample.error for sample in samples if sample.error), "")
    kept = [sample for sample in samples if sample.image is not None]
    if not kept:
        return Batch(None, None, [], unreadable, error)
    images = torch.stack([sample.image for sample in kept])
    targets = torch.tensor([sample.target for sample in kept])
    holes = [sample.hole for sample in kept]
    return Batch(images, targets, holes, unreadable, error)


class FolderImages(Dataset[Sample]):
    """An image folder whose augmentation is seeded by (seed, epoch, index) alone.

    root: holds one sub-folder a class. on_error: `raise` puts an error into the sample of an
    unreadable image, `skip` leaves the image out, or takes the next readable one where `replace`.
    unreadable: the files left out so far, kept by the loader in the main process.
    Raises DataError for a missing folder, one without classes and an empty class.
    """

    def __init__(
        self, root: Path, transform: Transform, *, seed: int, on_error: str, replace: bool
    ) -> None:
        folder = _read_folder(root)
        self.classes: list[str] = folder.classes
        self.samples: list[tuple[str, int]] = folder.samples
        self.transform = transform
        self.seed = seed
        self.on_error = on_error
        self.replace = replace
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: tuple[int, int]) -> Sample:
        epoch, index = draw
        unreadable: list[str] = []
        tries = min(_MAX_IN_A_ROW, len(self)) if self.replace else 1
        for offset in range(tries):
            path, target = self.samples[(index + offset) % len(self)]
            try:
                image = read_image(path)
            except DataError as error:
                unreadable.append(path)
                if self.on_error == "raise":
                    return Sample(None, target, None, tuple(unreadable), f"{error}\n{_HINT}")
                continue
            with seeded(self.seed, epoch, index):
                view = self.transform(image)
            return Sample(view.image, target, view.hole, tuple(unreadable))
        message = f"{tries} images in a row cannot be read, the first is {unreadable[0]}"
        return Sample(None, target, None, tuple(unreadable), message if self.replace else "")


def read_image(path: str | Path) -> Tensor:
    """The image as RGB bytes (h, w, 3).

    JPEGs of three colours are decoded by torchvision, all else by Pillow; both decode a JPEG with
    libjpeg-turbo, to the same bytes. Raises DataError where the file cannot be read.
    """
    try:
        image = _decode_jpeg(path)
        return to_bytes(default_loader(path)) if image is None else image
    except _UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read the image {path}: {reason}") from error


def _decode_jpeg(path: str | Path) -> Tensor | None:
    """The bytes of a JPEG in RGB; None for grey, CMYK, other formats and damage."""
    content = np.fromfile(path, np.uint8)
    if content[:3].tobytes() != _JPEG:
        return None
    try:
        image = decode_jpeg(torch.from_numpy(content))
    except RuntimeError:  # Pillow shall say what is wrong
        return None
    return image.permute(1, 2, 0) if len(image) == 3 else None


def _read_folder(root: Path) -> ImageFolder:
    if not root.is_dir():
        raise DataError(
            f"no such folder: {root}\n"
            "DATA.PATH (--data-path) is expected to hold train/ and val/, "
            "each with one sub-folder a class."
        )
    if not any(entry.is_dir() for entry in root.iterdir()):
        raise DataError(f"expected one sub-folder a class in {root}, found no folder")
    folder = ImageFolder(str(root), allow_empty=True)
    empty = [
        folder.classes[i] for i in sorted(set(range(len(folder.classes))) - set(folder.targets))
    ]
    if empty:
        raise DataError(
            f"expected images in every class folder of {root}, found none in {shorten(empty)}\n"
            "Add images (.jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp) or remove the folders."
        )
    return folder


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names in one line, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
