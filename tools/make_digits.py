"""Write scikit-learn's handwritten digits as an image folder: OUT/{train,val}/{0..9}/*.png.

    python tools/make_digits.py OUT                        1437 + 360 images of 8x8 pixels
    python tools/make_digits.py OUT --cluttered --size 112 each digit small, amid stray strokes

With --cluttered, OUT/positions.csv says where each digit is. The same arguments write the same
bytes; a folder that already holds them is left as it is.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from quadmamba.configs import Parser, path_argument
from quadmamba.utils.console import lasting_console

VAL_IMAGES = 360
SIDES = (0.1, 0.4)  # side of a digit on the cluttered canvas, as fractions of the canvas
# Options of --cluttered: the default and the least value
_CLUTTER = {
    "size": (112, 32),
    "seed": (0, 0),
    "strokes": (48, 0),
    "train": (None, 10),
    "val": (None, 10),
}
FAINT = 32  # grey values below it count as background


def load_split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 8, 8) uint8 and labels (n,) of `train` and `val`: fixed, and alike in classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        np.arange(len(images)), test_size=VAL_IMAGES, stratify=digits.target, random_state=0
    )
    return {
        name: (images[part], digits.target[part]) for name, part in zip(("train", "val"), parts)
    }


def clutter(
    images: np.ndarray, index: int, size: int, strokes: int, rng: np.random.Generator
) -> tuple[Image.Image, tuple[int, int, int]]:
    """Paste images[index] at a random place and scale amid pieces of the other images.

    images: (n, 8, 8) uint8. strokes: pieces to try; those that touch the digit are left out.
    Returns a grey canvas of size x size pixels, and the top, left and side of the digit's square.
    """
    side = _random_side(size, rng)
    top, left = (int(v) for v in rng.integers(0, size - side + 1, 2))
    canvas = Image.new("L", (size, size))
    canvas.paste(_scaled(images[index], side, side), (left, top))
    taken = canvas.filter(ImageFilter.MaxFilter(2 * (side // 8) + 1))
    for _ in range(strokes):
        other = (index + rng.integers(1, len(images))) % len(images)
        piece = _cut(images[other], _random_side(size, rng), rng)
        x, y = rng.integers(0, size - piece.width + 1), rng.integers(0, size - piece.height + 1)
        box = (int(x), int(y), int(x) + piece.width, int(y) + piece.height)
        if ImageChops.darker(taken.crop(box), piece).getextrema()[1] < FAINT:
            canvas.paste(ImageChops.lighter(canvas.crop(box), piece), box)
    return canvas, (top, left, side)


def _random_side(size: int, rng: np.random.Generator) -> int:
    return round(size * rng.uniform(*SIDES))


def _cut(image: np.ndarray, side: int, rng: np.random.Generator) -> Image.Image:
    """A piece of 3 to 4 of the 8 rows and columns, at the scale of a digit of `side` pixels."""
    rows, columns = (int(n) for n in rng.integers(3, 5, 2))
    y, x = rng.integers(0, 8 - rows + 1), rng.integers(0, 8 - columns + 1)
    piece = image[y : y + rows, x : x + columns]
    return _scaled(piece, max(1, rows * side // 8), max(1, columns * side // 8))


def _scaled(image: np.ndarray, height: int, width: int) -> Image.Image:
    return Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)


def write_plain(out: Path) -> None:
    """Write every digit as a grey PNG of 8x8 pixels."""
    for part, (images, labels) in load_split().items():
        for index, (image, label) in enumerate(zip(images, labels)):
            _save(Image.fromarray(image), out / _name(part, label, index))


def write_cluttered(out: Path, args: argparse.Namespace) -> None:
    """Write cluttered digits, args.train and args.val canvases (None: one for each digit).

    positions.csv says where each digit is. Canvas i shows digit i modulo their number, and depends
    on (size, strokes, seed, part, i) alone.
    """
    with open(out / "positions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "center_y", "center_x", "side", "size"])
        for number, (part, (images, labels)) in enumerate(load_split().items()):
            for i in range(vars(args)[part] or len(images)):
                rng = np.random.default_rng((args.seed, number, i))
                canvas, (top, left, side) = clutter(
                    images, i % len(images), args.size, args.strokes, rng
                )
                name = _name(part, labels[i % len(images)], i)
                _save(canvas, out / name)
                writer.writerow([name, top + side / 2, left + side / 2, side, args.size])


def _name(part: str, label: int, index: int) -> str:
    return f"{part}/{label}/{index:05d}.png"


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "out", type=path_argument, metavar="OUT", help="folder to write, new or empty"
    )
    parser.add_argument("--cluttered", action="store_true", help="small digits amid stray strokes")
    parser.add_argument("--size", type=int, help="side of a cluttered canvas (default 112)")
    parser.add_argument("--seed", type=int, help="seed of the clutter (default 0)")
    parser.add_argument("--strokes", type=int, metavar="N", help="stray pieces (default 48)")
    parser.add_argument("--train", type=int, metavar="N", help="cluttered training images")
    parser.add_argument("--val", type=int, metavar="N", help="cluttered validation images")
    args = parser.parse_args(argv)
    given = [key for key in _CLUTTER if vars(args)[key] is not None]
    if not args.cluttered and given:
        parser.error(f"--{' and --'.join(given)} expected to go with --cluttered")
    for key, (default, lowest) in _CLUTTER.items():
        if key not in given:
            setattr(args, key, default)
        elif vars(args)[key] < lowest:
            parser.error(f"expected --{key} {lowest} or more, got {vars(args)[key]}")
    return args


@lasting_console()
def main(argv: list[str] | None = None) -> int:
    """Write the folder and return the exit code: 0, or 2 where OUT holds something else."""
    args = _parse_args(argv)
    out: Path = args.out.resolve()
    done = {key: value for key, value in vars(args).items() if key != "out"}
    marker = out / "digits.json"
    if _holds(marker, done):
        print(f"{out} already holds these digits")
        return 0
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = "give another or remove it"
        print(f"error: {out}: expected a new or empty folder; {hint}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("sklearn") is None:
        print(
            "expected scikit-learn, which holds the digits: pip install scikit-learn",
            file=sys.stderr,
        )
        return 2
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # In a folder beside OUT first, so that OUT is never half written
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=out.parent) as around:
            part = Path(around) / out.name
            part.mkdir()
            if args.cluttered:
                write_cluttered(part, args)
            else:
                write_plain(part)
            (part / marker.name).write_text(json.dumps(done) + "\n")
            os.replace(part, out)
    except OSError as error:
        print(f"error: {out}: expected a place that can be written: {error}", file=sys.stderr)
        return 2
    count = sum(1 for _ in out.glob("*/*/*.png"))
    print(f"{out}: {count} images")
    return 0


def _holds(marker: Path, done: dict[str, object]) -> bool:
    try:
        return json.loads(marker.read_text()) == done
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
