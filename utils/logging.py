"""What a run says: the console, a progress bar, JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from termcolor import colored
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from quadmamba.utils.versions import versions

LOG_FILE = "log.jsonl"
_BAR = 24


class OutputError(OSError):
    """The output folder cannot be made or written."""


def make_output(folder: Path) -> None:
    """Make the output folder and write to it once. Raises OutputError where that fails."""
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"OUTPUT: expected a folder that can be written, got {folder}: {error.strerror}; "
            "choose another with --output"
        ) from error


class RunLog:
    """The voice of one rank: silent where `quiet`; files only with a `folder`.

    folder: receives log.jsonl, one JSON object a line, appended, and TensorBoard's events.
    """

    def __init__(self, folder: Path | None = None, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        try:
            self._lines = _open_lines(folder / LOG_FILE) if folder else None
        except OSError as error:
            raise OutputError(
                f"OUTPUT: expected a log file that can be written, got {folder}/{LOG_FILE}: "
                f"{error.strerror}; move it away or choose another folder with --output"
            ) from error
        self._board = SummaryWriter(str(folder)) if folder else None

    def say(self, text: str, color: str | None = None) -> None:
        """Print a line, in colour on a terminal that has it."""
        if self._quiet:
            return
        if self._terminal:
            sys.stderr.write("\r\033[K")  # the progress bar
            sys.stderr.flush()
        sys.stdout.write(colored(text, color) + "\n" if color else text + "\n")
        sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.say(f"warning: {text}", "yellow")

    def record(self, kind: str, updates: int, **values: object) -> None:
        """One JSON line; numbers go to TensorBoard as `kind`/name at `updates` too. NaN and
        infinities become null.
        """
        safe = {key: _finite(value) for key, value in values.items()}
        entry = {"kind": kind, "updates": updates, "time": round(time.time(), 3), **safe}
        with _writing():
            if self._lines is not None:
                self._lines.write(json.dumps(entry, allow_nan=False) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(f"{kind}/{name}", value, updates)

    def begin(self, config: Mapping[str, object], classes: Sequence[str]) -> None:
        """Record what a run is: its configuration, class names and versions."""
        self.record("run", 0, config=config, classes=list(classes), versions=versions())

    def images(self, name: str, images: Tensor, updates: int) -> None:
        """Pictures (n, 3, h, w) in [0, 1] to TensorBoard."""
        if self._board is not None:
            with _writing():
                self._board.add_images(name, images, updates)

    def progress(self, label: str, done: int, total: int) -> None:
        """Draw a progress bar, on a terminal only; it goes away when complete."""
        if not self._terminal:
            return
        filled = _BAR * done // max(total, 1)
        bar = "#" * filled + "." * (_BAR - filled)
        sys.stderr.write(f"\r\033[K{label} [{bar}] {done}/{total}" if done < total else "\r\033[K")
        sys.stderr.flush()

    def close(self) -> None:
        """Flush and close the files."""
        with _writing():
            if self._lines is not None:
                self._lines.close()
            if self._board is not None:
                self._board.close()


def _open_lines(path: Path) -> TextIO:
    """The log to append to, after ending the line that a killed run may have left half written."""
    lines = path.open("a", buffering=1)
    with path.open("rb") as before:
        if before.seek(0, os.SEEK_END) and before.seek(-1, os.SEEK_END) and before.read() != b"\n":
            lines.write("\n")
    return lines


@contextmanager
def _writing() -> Iterator[None]:
    """OutputError where the disk takes no more of the log."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"OUTPUT: cannot write the log: {error}; the last checkpoint is kept, and the same "
            "command goes on from it once there is room"
        ) from error


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
