"""Look for files of an image folder that a training would stumble over.

    python tools/check_data.py DIR                   DIR holds CLASS/*, or train/CLASS/* and so on
    python tools/check_data.py DIR --json FILE       the same as JSON too, - for the console

Reads every image whole, in parallel. Lists what is unreadable, empty or truncated, and what is not
RGB (which a training converts). Exit code: 0 all can be read, 1 some cannot, 2 no such folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from quadmamba.data import DataError, read_image
from quadmamba.utils.logging import RunLog

FAULTS = ("unreadable", "empty", "truncated")
_CHUNK = 64


@dataclass
class Findings:
    """What was found: paths below the folder for each kind of file, and images by class.

    not_rgb: path and mode of images that are converted. other_files: how many are no images by
    their names. empty_classes: class folders without images.
    """

    images: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    not_rgb: dict[str, str] = field(default_factory=dict)
    empty_classes: list[str] = field(default_factory=list)
    other_files: int = 0

    @property
    def bad(self) -> int:
        """How many files and classes a training cannot use."""
        return sum(len(getattr(self, kind)) for kind in (*FAULTS, "empty_classes"))


def check_file(path: str) -> tuple[str, str]:
    """The kind of a file, "" for a sound RGB image, and its mode or what is wrong with it."""
    if os.path.isfile(path) and not os.path.getsize(path):
        return "empty", "0 bytes"
    try:
        read_image(path)
        with Image.open(path) as image:
            return ("", "RGB") if image.mode == "RGB" else ("not_rgb", image.mode)
    except DataError as error:
        text = str(error)
        cut = any(word in text.lower() for word in ("truncated", "broken data stream"))
        return "truncated" if cut else "unreadable", text


def scan(root: Path, workers: int, log: RunLog) -> Findings:
    """Check every image below `root` in `workers` processes."""
    folders = [(Path(at), names) for at, _, names in os.walk(root, followlinks=True)]
    files = sorted(folder / name for folder, names in folders for name in names)
    images = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
    found = Findings(images=len(images), other_files=len(files) - len(images))
    counts = Counter(str(path.parent.relative_to(root)) for path in images)
    found.classes = dict(sorted(counts.items()))
    filled = {parent for path in images for parent in path.parents}
    found.empty_classes = sorted(
        str(folder.relative_to(root)) for folder, _ in folders if folder not in filled | {root}
    )
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(check_file, map(str, images), chunksize=_CHUNK)
        for number, (path, (kind, detail)) in enumerate(zip(images, results), 1):
            name = str(path.relative_to(root))
            if kind == "not_rgb":
                found.not_rgb[name] = detail
            elif kind:
                getattr(found, kind).append(name)
            log.progress("check", number, len(images))
    return found


def report(root: Path, found: Findings) -> Iterable[str]:
    """The findings as lines of text."""
    yield f"{root}: {found.images} images in {len(found.classes)} folders"
    for folder, count in found.classes.items():
        yield f"  {folder:<30} {count:>8}"
    for kind in (*FAULTS, "empty_classes"):
        names = getattr(found, kind)
        yield f"{kind.replace('_', ' ')}: {len(names)}"
        yield from (f"  {name}" for name in names)
    yield f"not RGB (converted on reading): {len(found.not_rgb)}"
    yield from (f"  {name}  {mode}" for name, mode in found.not_rgb.items())
    yield f"other files: {found.other_files}"


def main(argv: Sequence[str] | None = None) -> int:
    """Check a folder and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON, - for stdout")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        print(f"error: no such folder: {args.folder}", file=sys.stderr)
        return 2
    found = scan(args.folder, max(1, args.workers), RunLog())
    if args.json != "-":
        print("\n".join(report(args.folder, found)))
    if args.json:
        text = json.dumps({"folder": str(args.folder), **asdict(found)}, indent=1)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")
    return 1 if found.bad else 0


if __name__ == "__main__":
    sys.exit(main())
