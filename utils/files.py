"""Files that are at any moment the old one or the whole new one, and disks that take no more."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of a folder, on some network file systems


class OutputError(OSError):
    """What a program writes cannot be written: a folder, a log, the console."""


def older(path: Path, number: int) -> Path:
    """The name of the file that was `path` so many saves ago: last.pth, last.1.pth, ..."""
    return path.with_suffix(f".{number}{path.suffix}") if number else path


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its place: alone in a folder, so that whatever a
    killed process or a library leaves there can be removed at once.
    """
    return path.with_name(f".{path.name}.partial") / path.name


def clear_partial(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`."""
    for left in folder.glob(partial_of(Path("*")).parent.name):
        shutil.rmtree(left, ignore_errors=True)


def put(path: Path, write: Callable[[Path], object], *, keep: int = 1) -> None:
    """Let `write` make a file, which takes the place of `path` once it is whole and on the disk.

    keep: how many files of the name stay, the older ones as NAME.1.SUFFIX and so on. Raises
    whatever `write` or the disk does; `path` is then as before.
    """
    partial = partial_of(path)
    try:
        partial.parent.mkdir(exist_ok=True)
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        for number in range(keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                older(path, number - 1).replace(older(path, number))
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """See that the names in `folder` are on the disk, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def reason(error: OSError, folder: Path, need: int = 0) -> str:
    """Why `folder` does not take a file, in words; of a full disk also how much room there is.

    need: bytes of the file, where they are known.
    """
    text = error.strerror or str(error)
    if error.errno not in _NO_ROOM:
        return text
    size = f"the file takes {need / 1e6:.1f} MB, " if need else ""
    return f"{text}: {size}{_free(folder) / 1e6:.1f} MB are free on the disk of {folder}"


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
