"""Look for files and folders that a training would stumble over.

    python tools/check_data.py DIR               DIR holds train/CLASS/* and val/CLASS/*, or CLASS/*
    python tools/check_data.py DIR --json FILE   the same as JSON too, - for the console

Reads every image whole, in parallel, by the rules of a training (docs/data.md). Lists

  bad       files that are unreadable, empty, truncated or above the limit of pixels, files that end
            or hang the process that reads them, classes without images, folders in the wrong place
  doubtful  files that can be read although a decoder or a checksum complains
  for your information: what is not RGB, what has an EXIF orientation, what is left out

Exit codes: 0 nothing bad, 1 something bad, 2 the check itself failed (wrong arguments, no such
folder, a report that cannot be written), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from quadmamba.configs import Parser, load_cfg, path_argument
from quadmamba.data.folders import (
    PARTS,
    Survey,
    differing_classes,
    missing,
    notes,
    problems,
    survey,
)
from quadmamba.data.images import (
    DataError,
    TooManyPixels,
    is_image_name,
    open_image,
    orientation,
    read_pixels,
    shown,
)
from quadmamba.utils.checkpoint import CheckpointError
from quadmamba.utils.console import check_printed, lasting_console
from quadmamba.utils.isolation import Lost, map_isolated
from quadmamba.utils.logging import RunLog
from quadmamba.utils.writer import save_file

FAULTS = ("unreadable", "empty", "truncated", "too_large")
_CUT = ("truncated", "broken data stream")
BAD, FAILED = 1, 2  # exit codes
CONSOLE = Path("-")


class Checked(NamedTuple):
    """One file: its fault ("" for none) and the reason; else what is worth knowing of it.

    mode: of its pixels, as Pillow names it. turned: its EXIF orientation. doubts: what decoders
    and checksums complain of.
    """

    fault: str = ""
    reason: str = ""
    mode: str = "RGB"
    turned: int = 1
    doubts: tuple[str, ...] = ()


@dataclass
class Findings:
    """What was found: paths below the folder for each kind of file, and images by class.

    layout: what is wrong with the folders. reasons: why a file is bad. not_rgb: mode of images that
    are converted. exif_orientation: of images that have one, which is not applied. other_files: how
    many are no images by their names. notes: what is left out, as a training says it.
    """

    images: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    layout: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    too_large: list[str] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, list[str]] = field(default_factory=dict)
    not_rgb: dict[str, str] = field(default_factory=dict)
    exif_orientation: dict[str, int] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    other_files: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """How many files, classes and folders a training cannot use."""
        return sum(len(getattr(self, kind)) for kind in (*FAULTS, "empty_classes", "layout"))


def check_file(path: str, max_pixels: int) -> Checked:
    """Read one file as a training does, and look at what is odd about it."""
    mode, turned, fault, reason = "RGB", 1, "", ""
    with _overheard() as doubts:
        try:
            read_pixels(path, max_pixels)
        except DataError as error:
            fault, reason = _kind(path, error), str(error).split(": ", 1)[-1]
        else:
            mode, turned = _look(path, max_pixels)
    words = dict.fromkeys(map(shown, doubts))
    if fault:
        return Checked(fault, "; ".join([reason, *words]))
    return Checked(mode=mode, turned=turned, doubts=tuple(words))


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """Collect what is warned of meanwhile, and what libraries in C write to stderr."""
    heard: list[str] = []
    before = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # has a limit of ours
            os.dup2(file.fileno(), 2)
            yield heard
            file.seek(0)
            heard += [str(warning.message) for warning in caught]
            heard += file.read().decode(errors="replace").splitlines()
    finally:
        os.dup2(before, 2)
        os.close(before)


def _kind(path: str, error: DataError) -> str:
    if isinstance(error.__cause__, TooManyPixels):
        return "too_large"
    if os.path.isfile(path) and not os.path.getsize(path):
        return "empty"
    return "truncated" if any(word in str(error).lower() for word in _CUT) else "unreadable"


def _look(path: str, max_pixels: int) -> tuple[str, int]:
    """Mode and orientation of a file that can be read; warns of what is odd about it."""
    mode, turned = "RGB", 1
    try:
        with open(path, "rb") as file:
            with open_image(file, path, max_pixels) as image:
                mode, is_png = image.mode, image.format == "PNG"
                turned = orientation(image)
            if is_png:  # reading one does not look at the checksums of its pixels
                with open_image(file, path, max_pixels) as image:
                    image.verify()
    except Exception as error:  # noqa: BLE001 - Pillow may raise anything for a damaged file
        warnings.warn(f"{type(error).__name__}: {error}", stacklevel=1)
    return mode, turned


def scan(root: Path, args: argparse.Namespace, log: RunLog) -> Findings:
    """Check every image of `root` that a training would read, in `args.workers` processes."""
    parts = [root / part for part in PARTS if (root / part).is_dir()] or [root]
    surveys = [survey(part) for part in parts]
    found = Findings()
    for part in surveys:
        _add_folders(found, root, part)
    if len(parts) == 1 and parts != [root]:
        found.layout += [missing(root / part) for part in PARTS if root / part not in parts]
    elif len(parts) == 2:
        text = differing_classes(root, *(list(part.images) for part in surveys))
        found.layout += [text] if text else []
    paths = [path for part in surveys for images in part.images.values() for path in images]
    if not any(part.images for part in surveys):  # no classes at all: the files lie here
        paths = [path for part in surveys for path in part.loose if is_image_name(path)]
    found.images = len(paths)
    check = partial(check_file, max_pixels=args.max_pixels)
    results = {}
    for path, result in map_isolated(check, paths, workers=args.workers, timeout=args.timeout):
        lost = isinstance(result, Lost)
        results[path] = Checked("unreadable", result.reason) if lost else result
        log.progress("check", len(results), len(paths))
    for path in paths:
        _add_file(found, os.path.relpath(path, root), results[path])
    return found


def _add_folders(found: Findings, root: Path, part: Survey) -> None:
    def name(label: str) -> str:
        return os.path.relpath(part.root / label, root)

    found.classes.update({name(label): len(paths) for label, paths in part.images.items()})
    found.empty_classes += [name(label) for label in part.empty]
    found.layout += problems(part)
    found.hidden += [os.path.relpath(path, root) for path in part.hidden]
    found.other_files += len(part.others) + len(part.loose)
    found.notes += notes(part)


def _add_file(found: Findings, name: str, result: Checked) -> None:
    if result.fault:
        getattr(found, result.fault).append(name)
        found.reasons[name] = result.reason
    if result.mode != "RGB":
        found.not_rgb[name] = result.mode
    if result.turned != 1:
        found.exif_orientation[name] = result.turned
    if result.doubts:
        found.doubtful[name] = list(result.doubts)


def report(root: Path, found: Findings) -> Iterator[str]:
    """The findings as lines of text."""
    yield f"{shown(root)}: {found.images} images in {len(found.classes)} folders"
    for folder, count in found.classes.items():
        yield f"  {shown(folder):<30} {count:>8}"
    for text in found.layout:
        yield f"folders: {text}"
    for kind in (*FAULTS, "empty_classes"):
        names = getattr(found, kind)
        yield f"{kind.replace('_', ' ')}: {len(names)}"
        yield from (f"  {shown(name)}  {found.reasons.get(name, '')}".rstrip() for name in names)
    yield f"doubtful (read all the same): {len(found.doubtful)}"
    yield from (f"  {shown(name)}  {'; '.join(why)}" for name, why in found.doubtful.items())
    yield f"not RGB (converted on reading): {len(found.not_rgb)}"
    yield from (f"  {shown(name)}  {mode}" for name, mode in found.not_rgb.items())
    yield f"EXIF orientation (not applied): {len(found.exif_orientation)}"
    yield from (f"  {shown(name)}  {turned}" for name, turned in found.exif_orientation.items())
    yield f"hidden: {len(found.hidden)}"
    yield f"other files: {found.other_files}"
    yield from (f"note: {text}" for text in found.notes)


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    cores, limit = os.cpu_count() or 1, load_cfg().DATA.MAX_PIXELS
    parser.add_argument("folder", type=path_argument, metavar="DIR")
    parser.add_argument(
        "--json",
        type=path_argument,
        metavar="FILE",
        help="write the findings as JSON, - for stdout",
    )
    parser.add_argument("--workers", type=_at_least_one, default=cores, help="processes")
    parser.add_argument(
        "--max-pixels", type=_at_least_one, default=limit, metavar="N", help="DATA.MAX_PIXELS"
    )
    parser.add_argument(
        "--timeout", type=_at_least_one, default=300, metavar="SECONDS", help="for one file"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> int:
    """Check a folder; returns the exit code.

    Raises OSError and CheckpointError where the folder cannot be read or the report not be written.
    """
    if not args.folder.is_dir():
        raise NotADirectoryError(f"no such folder: {shown(args.folder)}")
    path = None if args.json == CONSOLE else args.json
    if path:
        _try_to_write(path)
    found = scan(args.folder, args, RunLog())
    if args.json != CONSOLE:
        print("\n".join(report(args.folder, found)))
    text = json.dumps({"folder": str(args.folder), **asdict(found)}, indent=1)
    if path:
        save_file(path, lambda part: part.write_text(text + "\n"))
    elif args.json:
        print(text)
    check_printed()
    return BAD if found.bad else 0


def _try_to_write(path: Path) -> None:
    """Find out before the work whether the report can be written."""
    if path.is_dir():
        raise IsADirectoryError(f"--json: expected a file, got the folder {path}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"--json: cannot write to {path}: {error.strerror}") from error


@lasting_console()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = _parse_args(argv)
    try:
        code = check(args)
        check_printed()
        return code
    except (OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception:  # noqa: BLE001 - Python's exit code of a crash would say "something bad"
        traceback.print_exc()
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
