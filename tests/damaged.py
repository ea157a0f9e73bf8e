"""Image files of eleven formats, built and damaged at random from one seed.

python tests/damaged.py FOLDER COUNT [SEED]    write them, as FOLDER/{a,b}/*
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

# Format: endings, modes that it stores
FORMATS = {
    "JPEG": ((".jpg", ".jfif", ".JPEG"), ("RGB", "L", "CMYK")),
    "PNG": ((".png", ".PNG"), ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "GIF": ((".gif",), ("1", "L", "P", "RGB")),
    "BMP": ((".bmp",), ("1", "L", "P", "RGB", "RGBA")),
    "TIFF": (
        (".tif", ".tiff"),
        ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    ),
    "WEBP": ((".webp",), ("RGB", "RGBA", "L")),
    "AVIF": ((".avif",), ("RGB", "RGBA", "L")),
    "PPM": ((".ppm", ".pgm", ".pbm"), ("1", "L", "RGB", "I;16", "F")),
    "JPEG2000": ((".jp2", ".j2k"), ("L", "LA", "RGB", "RGBA", "I;16")),
    "QOI": ((".qoi",), ("RGB", "RGBA")),
    "TGA": ((".tga",), ("1", "L", "LA", "P", "RGB", "RGBA")),
}
SLOW = {"AVIF": 2**16, "JPEG2000": 2**18, "QOI": 2**16, "WEBP": 2**18}  # pixels at most
LONGEST = {"WEBP": 16383, "AVIF": 8000, "GIF": 20000}
DAMAGES = ("none", "none", "none", "flips", "cut", "header", "size", "zeros", "splice", "special")


def picture(mode: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Coarse random patches, in which a wrong row or colour shows."""
    small = rng.integers(0, 256, (min(height, 9), min(width, 11), 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    grey = np.asarray(image.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257 + 19)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32))
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(255 - grey))
        return image
    return image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)


def options(name: str, mode: str, rng: np.random.Generator) -> dict[str, object]:
    """Ways in which an encoder of this format may write."""
    if name == "JPEG":
        return {
            "quality": int(rng.integers(1, 101)),
            "subsampling": int(rng.integers(3)),
            "progressive": bool(rng.integers(2)),
            "restart_marker_blocks": int(rng.integers(3)),
        }
    if name == "TIFF":
        codecs = ["raw", "tiff_lzw", "tiff_deflate", "packbits"] + ["group4"] * (mode == "1")
        return {"compression": str(rng.choice(codecs))}
    if name == "WEBP":
        return {"lossless": bool(rng.integers(2)), "method": 0}
    if name == "AVIF":
        return {"speed": 10}
    if name == "PNG" and mode == "P":
        return {"transparency": bytes(range(256))} if rng.integers(2) else {"transparency": 3}
    return {"rle": mode != "1" and bool(rng.integers(2))} if name == "TGA" else {}


def encode(name: str, mode: str, rng: np.random.Generator) -> bytes:
    """A sound file; sides are 1 to 20,000 pixels, small ones more often."""
    top = SLOW.get(name, 2**24 if rng.random() < 0.01 else 2**18)
    width = int(2 ** rng.uniform(0, np.log2(LONGEST.get(name, 20000))))
    height = int(min(2 ** rng.uniform(0, np.log2(LONGEST.get(name, 20000))), max(1, top // width)))
    if rng.integers(2):
        width, height = height, width
    out = io.BytesIO()
    picture(mode, width, height, rng).save(out, name, **options(name, mode, rng))
    return out.getvalue()


# ----------------------------------------------------------------------------------------- damages
def flips(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
        data[place] = int(rng.integers(256))


def cut(data: bytearray, rng: np.random.Generator) -> None:
    ends = (rng.integers(0, 64), rng.integers(0, len(data)), len(data) - rng.integers(1, 20))
    del data[max(0, int(rng.choice(ends))) :]


def header(data: bytearray, rng: np.random.Generator) -> None:
    first, count = int(rng.integers(0, 8)), int(rng.integers(1, 48))
    data[first : first + count] = rng.bytes(count)


def zeros(data: bytearray, rng: np.random.Generator) -> None:
    first = int(rng.integers(0, len(data)))
    data[first:] = bytes(len(data) - first)


def splice(data: bytearray, rng: np.random.Generator) -> None:
    a, b, c = sorted(int(place) for place in rng.integers(0, len(data), 3))
    data[a:c] = data[b:c] + data[a:b]


def _jpeg_sides(data: bytearray, width: int, height: int) -> None:
    for mark in (b"\xff\xc0", b"\xff\xc2"):
        place = data.find(mark)
        if place > 0:
            data[place + 5 : place + 9] = struct.pack(">HH", height % 65536, width % 65536)


def _png_sides(data: bytearray, width: int, height: int) -> None:
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))


def _tiff_sides(data: bytearray, width: int, height: int) -> None:
    for tag, side in ((256, width), (257, height)):
        place = data.rfind(struct.pack("<H", tag))
        data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, side)


def _webp_sides(data: bytearray, width: int, height: int) -> None:
    sides = b"".join(struct.pack("<I", side % 16383)[:3] for side in (width, height))
    data[12:30] = b"VP8X" + struct.pack("<IB3x", 10, 0) + sides


def _ppm_sides(data: bytearray, width: int, height: int) -> None:
    words = bytes(data).split(maxsplit=3)
    data[:] = b"%s %d %d %s" % (words[0], width, height, words[3] if len(words) > 3 else b"")


def _plain_sides(place: int, form: str, data: bytearray, width: int, height: int) -> None:
    size, top = struct.calcsize(form), 65536 if "H" in form else 2**32
    data[place : place + size] = struct.pack(form, width % top, height % top)


SIDES = {
    "JPEG": _jpeg_sides,
    "PNG": _png_sides,
    "TIFF": _tiff_sides,
    "WEBP": _webp_sides,
    "PPM": _ppm_sides,
    "GIF": partial(_plain_sides, 6, "<HH"),
    "BMP": partial(_plain_sides, 18, "<ii"),
    "QOI": partial(_plain_sides, 4, ">II"),
    "TGA": partial(_plain_sides, 12, "<HH"),
}


def huge_sides(name: str, data: bytearray, rng: np.random.Generator) -> None:
    """Let the header claim more pixels than there are."""
    width, height = (int(v) for v in rng.choice([5_000, 9_999, 15_000, 65_500, 2**31 - 1], 2))
    if name in SIDES:
        SIDES[name](data, width, height)
    else:
        flips(data, rng)


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def special(name: str, data: bytearray, rng: np.random.Generator) -> None:
    """Damage of the kind for which this format is known."""
    if name == "PNG":
        bomb = zlib.compress(bytes(3_000_000))
        extra = {
            0: chunk(b"zTXt", b"Comment\0\0" + bomb),
            1: chunk(b"iCCP", b"profile\0\0" + bomb),
            2: chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb) * 30,
            3: chunk(b"tEXt", b"no end of the keyword"),
        }
        choice = int(rng.integers(5))
        if choice in extra:
            data[33:33] = extra[choice]
        else:  # a wrong checksum
            place = data.find(b"IDAT")
            end = place + 4 + struct.unpack(">I", data[place - 4 : place])[0]
            data[end] ^= 0xFF
    elif name == "TIFF":
        (first,) = struct.unpack("<I", data[4:8])
        (count,) = struct.unpack("<H", data[first : first + 2])
        choice = int(rng.integers(3))
        if choice == 0:  # the next directory is this one
            data[first + 2 + 12 * count : first + 6 + 12 * count] = data[4:8]
        else:  # one entry with an absurd type, count or place
            place = first + 2 + 12 * int(rng.integers(count))
            data[place + 2 : place + 12] = struct.pack(
                "<HII", int(rng.integers(20)), int(rng.integers(2**32)), int(rng.integers(2**32))
            )
    elif name == "GIF":  # the codes of the pixels
        place = int(rng.integers(len(data) // 2, len(data)))
        data[place : place + 12] = rng.bytes(12)
    elif name == "JPEG":  # the length of a segment, or a table
        place = data.find(rng.choice([b"\xff\xc4", b"\xff\xdb", b"\xff\xda"]))
        data[place + 2 : place + 5] = rng.bytes(3)
    else:
        flips(data, rng)
        cut(data, rng)


def damage(kind: str, name: str, data: bytearray, rng: np.random.Generator) -> None:
    if kind in ("size", "special"):
        {"size": huge_sides, "special": special}[kind](name, data, rng)
    elif kind != "none":
        {"flips": flips, "cut": cut, "header": header, "zeros": zeros, "splice": splice}[kind](
            data, rng
        )


def write(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """`count` files in two classes; the name tells format, mode and damage."""
    paths = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        name = list(FORMATS)[number % len(FORMATS)]
        endings, modes = FORMATS[name]
        mode, kind = str(rng.choice(modes)), str(rng.choice(DAMAGES))
        data = bytearray(encode(name, mode, rng))
        damage(kind, name, data, rng)
        stem = f"{number:05d}-{name}-{mode.replace(';', '')}-{kind}"
        path = folder / "ab"[number % 2] / (stem + str(rng.choice(endings)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(path)
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
