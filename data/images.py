"""What an image file is, and how it becomes RGB bytes: the one place for training and tools.

A file belongs to a data set by the ending of its name; its content says which format it has. The
rules for colours, depth, orientation and size are told in docs/data.md.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, features
from torch import Tensor

# Pillow's name of each format that is read, and the endings of its files
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "QOI": (".qoi",),
    "TGA": (".tga",),
}
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # parts of Pillow's build
_BY_NAME = ("TGA",)  # has no mark in its content
_JPEG_MARK = b"\xff\xd8\xff"
_WHOLE_JPEG = 2**28  # bytes; larger files are read piece by piece, by Pillow
_STRIP = 2**22  # pixels that are converted at once, so that few copies of a large image exist
_DECODERS = r"PIL\.|quadmamba\.data\.images$"  # modules whose warnings are about files
_WHITE_IS_ZERO = 0
_NO_FAULT = errno.EMFILE, errno.ENFILE  # of a file: this process or machine has too many open
_PHOTOMETRIC, _BITS = 262, 258  # tags of TIFF


class DataError(Exception):
    """Data that cannot be used: the message says what was expected, what came and what to do."""


class TooManyPixels(ValueError):
    """An image above the limit of pixels."""

    def __init__(self, count: str, max_pixels: int) -> None:
        super().__init__(
            f"it has {count} pixels, above the limit of {max_pixels:,} (DATA.MAX_PIXELS)"
        )


@cache
def endings() -> frozenset[str]:
    """The endings, in lower case, of the files that this build of Pillow can read."""
    missing = {name for name, part in _OPTIONAL.items() if not features.check(part)}
    return frozenset(ending for name in FORMATS if name not in missing for ending in FORMATS[name])


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; capitals do not matter."""
    return os.path.splitext(name)[1].lower() in endings()


def shown(path: str | Path) -> str:
    """A path in one line of valid text: control characters and bytes outside UTF-8 as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: repr(c[0])[1:-1], text)


def read_image(path: str | Path, max_pixels: int) -> Tensor:
    """The image as RGB bytes (h, w, 3), by the rules of `to_rgb`.

    What a decoder only warns of is not shown; tools/check_data.py lists it. Raises DataError, with
    the name of the file, where the file cannot be read or has more than `max_pixels` pixels;
    OSError where no file can be opened any more.
    """
    _silence()
    return torch.from_numpy(read_pixels(path, max_pixels))


def read_pixels(path: str | Path, max_pixels: int) -> np.ndarray:
    """As `read_image`, an array; what decoders complain of comes out as Python's warnings."""
    try:
        with _opened(path) as file:
            pixels = _decode_jpeg(file, max_pixels)
            if pixels is None:
                with open_image(file, path, max_pixels) as image:
                    pixels = to_rgb(image)
        return pixels
    except Exception as error:  # noqa: BLE001 - a decoder may raise anything for a damaged file
        if isinstance(error, OSError) and error.errno in _NO_FAULT:
            raise
        raise DataError(f"cannot read the image {shown(path)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line; with the kind of error where its words alone do not explain it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = shown(str(error))
    if words and isinstance(error, OSError | ValueError | SyntaxError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@contextmanager
def open_image(file: BinaryIO, path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """The file as Pillow opens it, in one of the formats read here, at its first frame.

    Raises TooManyPixels for more than `max_pixels`, before any memory is taken for them.
    """
    by_name = [name for name in _BY_NAME if Path(path).suffix.lower() in FORMATS[name]]
    formats = [name for name in FORMATS if name not in _BY_NAME] + by_name
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # Pillow refuses what has more than twice as many
    try:
        with Image.open(file, formats=formats) as image:
            _check_size(*image.size, max_pixels)
            yield image
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise TooManyPixels(f"{int(count[0]):,}", max_pixels) from error
    except UnidentifiedImageError as error:
        raise ValueError(_why_unknown(file, formats)) from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def to_rgb(image: Image.Image) -> np.ndarray:
    """The bytes (h, w, 3) of an image of any mode, as Pillow converts to RGB, but for deep grey.

    Grey of 9 to 16 bits is scaled to 8 and rounded. Transparency is dropped: the colours below it
    show. Raises ValueError for integers of 32 bits and floats, as their black and white are
    unknown.
    """
    image.load()
    top = _top_of_grey(image)
    if image.mode in ("I", "F") and not top:
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 or signed 16 bits"
        raise ValueError(
            f"its pixels are {kind}, whose black and white are unknown; save it with 8 bits, or as "
            "grey with 16"
        )
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for first in range(0, image.height, rows):
        part = image
        if rows < image.height:
            part = image.crop((0, first, image.width, min(first + rows, image.height)))
        pixels[first : first + rows] = _to_grey(part, image, top) if top else _to_colour(part)
    return pixels


def orientation(image: Image.Image) -> int:
    """The EXIF orientation that Pillow has not applied: 1 (upright) to 8."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _top_of_grey(image: Image.Image) -> int:
    """The value of white in an image of deep grey; 0 for all other images."""
    if image.mode == "I" and image.format == "PPM":  # Pillow scales these to 16 bits
        return 65535
    if not image.mode.startswith("I;16"):
        return 0
    bits = image.tag_v2.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
    return 2**bits - 1


def _to_grey(part: Image.Image, image: Image.Image, top: int) -> np.ndarray:
    """Deep grey (h, w, 1) in 8 bits; part: rows of `image`, whose values are 0 to `top`."""
    values = np.asarray(part).astype(np.uint32)
    grey = ((2 * 255 * values + top) // (2 * top)).clip(0, 255).astype(np.uint8)
    # Pillow inverts such files of 8 bits, but not those of 16
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC, 0) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return grey[..., None]


def _to_colour(part: Image.Image) -> np.ndarray:
    if part.mode in ("RGBa", "La"):  # from these Pillow goes to RGBA and LA only
        part = part.convert(part.mode.upper())
    return np.asarray(part if part.mode == "RGB" else part.convert("RGB"))


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file that is not empty; opening another kind could wait for ever."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("it is no regular file, but a folder, a pipe, a socket or a device")
    if not info.st_size:
        raise ValueError("it is empty (0 bytes)")
    with open(path, "rb") as file:
        yield file


def _decode_jpeg(file: BinaryIO, max_pixels: int) -> np.ndarray | None:
    """The bytes of a JPEG, to the bit as Pillow decodes it, but faster.

    None for what is left to Pillow: other formats, CMYK, damage, and oddities, which are warned of.
    """
    if file.read(len(_JPEG_MARK)) != _JPEG_MARK or os.fstat(file.fileno()).st_size > _WHOLE_JPEG:
        return None
    file.seek(0)
    content = file.read()
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except (ValueError, KeyError):  # KeyError: a subsampling without a name, or none, as of CMYK
        return None
    _check_size(width, height, max_pixels)
    if colours not in ("Gray", "YCbCr", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(content)
    except ValueError as error:
        warnings.warn(f"JPEG: {error}", stacklevel=1)
        return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(f"{width} x {height} = {width * height:,}", max_pixels)


def _why_unknown(file: BinaryIO, formats: list[str]) -> str:
    """What Pillow's readers say of a file that none of them opens."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before, Image.WARN_POSSIBLE_FORMATS = Image.WARN_POSSIBLE_FORMATS, True
        try:
            Image.open(file, formats=formats)
        except UnidentifiedImageError:
            pass
        finally:
            Image.WARN_POSSIBLE_FORMATS = before
    words = "; ".join(dict.fromkeys(str(warning.message) for warning in caught))
    return words or f"its content is of no known format ({', '.join(formats)})"


def _silence() -> None:
    """From now on keep what decoders warn of from the console of this process.

    The filters are changed once only, as each change lets other libraries repeat their warnings.
    """
    if all(getattr(entry[3], "pattern", "") != _DECODERS for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_DECODERS)
