"""What a run says: the console, a progress bar, JSON lines and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from termcolor import colored
from torch import Tensor

from quadmamba.utils.board import Board
from quadmamba.utils.console import fault
from quadmamba.utils.files import OutputError, older, put, reason
from quadmamba.utils.versions import versions

LOG_FILE = "log.jsonl"
STEP_KINDS = ("train", "val")  # of records that belong to a step; the others belong to the run
_BAR = 24


class RunLog:
    """The voice of one rank: silent where `quiet`; files only with a `folder`.

    folder: receives log.jsonl, one JSON object a line, appended, and TensorBoard's events.
    Raises OutputError where a file cannot be written.
    """

    def __init__(self, folder: Path | None = None, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._folder, self._told = folder, False
        self._lines = _Lines(folder / LOG_FILE) if folder else None
        self._board: Board | None = None
        self._forget: int | None = None
        self._again: list[dict] = []

    def say(self, text: str, color: str | None = None) -> None:
        """Print a line, in colour on a terminal that has it."""
        if self._quiet:
            return
        if self._terminal:
            sys.stderr.write("\r\033[K")  # the progress bar
            sys.stderr.flush()
        sys.stdout.write(colored(text, color) + "\n" if color else text + "\n")
        sys.stdout.flush()
        if self._lines is not None and not self._told and (error := fault()):
            self._told = True
            sys.stderr.write(
                f"warning: stdout takes no more ({error.strerror}); {LOG_FILE} has what follows\n"
            )

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.say(f"warning: {text}", "yellow")

    def record(self, kind: str, updates: int, **values: object) -> None:
        """One JSON line; numbers of a step go to TensorBoard as `kind`/name at `updates` too. NaN
        and infinities become null.
        """
        if self._lines is None:
            return
        safe = {key: _finite(value) for key, value in values.items()}
        entry = {"kind": kind, "updates": updates, "time": round(time.time(), 3), **safe}
        self._lines.add(entry)
        if kind in STEP_KINDS:
            with _writing(self._folder):
                self._tensorboard().scalars(_points(kind, values), updates, entry["time"])

    def begin(self, config: Mapping[str, object], classes: Sequence[str]) -> None:
        """Record what a run is: its configuration, class names and versions."""
        self.record("run", 0, config=config, classes=list(classes), versions=versions())

    def images(self, name: str, images: Tensor, updates: int) -> None:
        """Pictures (n, 3, h, w) in [0, 1] to TensorBoard."""
        if self._lines is not None:
            with _writing(self._folder):
                self._tensorboard().images(name, images, updates)

    def go_back(self, updates: int, epoch: int) -> None:
        """Take out of both logs what follows the step `updates` and the epochs completed: a run
        recorded it that did not live to save it, and it comes again.
        """
        if self._lines is None:
            return
        kept, undone = [], []
        for line in self._lines.before():
            (undone if _is_after(_entry(line), updates, epoch) else kept).append(line)
        steps = [_entry(line)["updates"] for line in undone]
        self._forget = min([updates + 1, *steps])
        # TensorBoard forgets all of a step; the log says what of it stays
        self._again = [entry for entry in map(_entry, kept) if _is_step(entry, self._forget)]
        if undone:
            self._lines.replace_before(kept)

    def start_over(self) -> None:
        """Put the log of an earlier run in the folder aside, as log.1.jsonl or the next number."""
        if self._lines is None:
            return
        self._forget = 0
        before = self._lines.before()
        if any(_is_step(_entry(line), 0) for line in before):
            self.say(f"the log of the run before is kept as {self._lines.put_aside(before)}")

    def withdraw(self) -> None:
        """Take back what was recorded since the log was opened, and record nothing more."""
        if self._lines is not None:
            self._lines.withdraw()
            self._lines = None

    def sync(self) -> None:
        """See that log.jsonl is on the disk."""
        if self._lines is not None:
            self._lines.sync()

    def progress(self, label: str, done: int, total: int) -> None:
        """Draw a progress bar, on a terminal only; it goes away when complete."""
        if not self._terminal:
            return
        filled = _BAR * done // max(total, 1)
        bar = "#" * filled + "." * (_BAR - filled)
        sys.stderr.write(f"\r\033[K{label} [{bar}] {done}/{total}" if done < total else "\r\033[K")
        sys.stderr.flush()

    def close(self) -> None:
        """Close the files."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            with _writing(self._folder):
                self._board.close()

    def _tensorboard(self) -> Board:
        """The events of this run, from its first step on."""
        if self._board is None:
            self._board = Board(self._folder, self._forget)
            for entry in self._again:
                points = _points(entry["kind"], entry)
                self._board.scalars(points, entry["updates"], entry["time"])
        return self._board


class _Lines:
    """log.jsonl: whole lines only, whatever cuts a life of the run off."""

    def __init__(self, path: Path) -> None:
        self._path, self._is_new = path, not path.exists()
        try:
            self._open()
            self._is_file = path.is_file()
            if self._is_file:
                _end_torn_line(path)
        except OSError as error:
            raise OutputError(
                f"OUTPUT: expected a log file that can be written, got {path}: "
                f"{reason(error, path.parent)}; move it away or choose another folder with --output"
            ) from error
        self._start = path.stat().st_size

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)

    def add(self, entry: Mapping[str, object]) -> None:
        """Append a line, or nothing where the disk takes no more."""
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        with _writing(self._path.parent):
            size = os.fstat(self._file.fileno()).st_size
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(size)
                raise

    def before(self) -> list[bytes]:
        """The lines from before the file was opened."""
        with _writing(self._path.parent):
            old = self._path.read_bytes()[: self._start] if self._is_file else b""
            return old.splitlines(keepends=True)

    def replace_before(self, lines: Sequence[bytes]) -> None:
        """Put `lines` in the place of those from before."""
        with _writing(self._path.parent):
            text = b"".join(lines)
            since = self._path.read_bytes()[self._start :]
            put(self._path, lambda partial: partial.write_bytes(text + since))
            self._file.close()
            self._open()
            self._start = len(text)

    def put_aside(self, lines: Sequence[bytes]) -> Path:
        """Move the lines from before to a file of their own; returns its path."""
        number = 1
        while older(self._path, number).exists():
            number += 1
        path = older(self._path, number)
        with _writing(self._path.parent):
            put(path, lambda partial: partial.write_bytes(b"".join(lines)))
        self.replace_before([])
        return path

    def withdraw(self) -> None:
        """Take back what was added, and close the file."""
        with _writing(self._path.parent):
            if self._is_file:
                self._file.truncate(self._start)
            self._file.close()
            if self._is_new:
                self._path.unlink()

    def sync(self) -> None:
        """See that the file is on the disk."""
        if self._is_file:
            with _writing(self._path.parent):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with _writing(self._path.parent):
            self._file.close()


def _end_torn_line(path: Path) -> None:
    """Cut off a last line that a killed run left half written; end one that only lacks its end."""
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        if _entry(content[whole:]):
            file.write(b"\n")
        else:
            file.truncate(whole)


def _entry(line: bytes) -> dict[str, object]:
    """The record in a line; {} where it is none of ours."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    ours = isinstance(entry, dict) and isinstance(entry.get("updates"), int) and "time" in entry
    return entry if ours else {}


def _is_step(entry: Mapping[str, object], first: int) -> bool:
    """Whether the record belongs to a step, from `first` on."""
    return entry.get("kind") in STEP_KINDS and entry["updates"] >= first


def _is_after(entry: Mapping[str, object], updates: int, epoch: int) -> bool:
    """Whether the record belongs to a step or an epoch after these."""
    if entry.get("kind") == "val":  # of a step that stays, but not part of what was saved after it
        return entry.get("epoch", 0) > epoch
    return _is_step(entry, updates + 1)


def _points(kind: str, values: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a record by their names in TensorBoard."""
    names = {key: value for key, value in values.items() if key not in ("updates", "time")}
    return {f"{kind}/{key}": v for key, v in names.items() if isinstance(v, int | float)}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """OutputError where the disk takes no more of the log."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"OUTPUT: cannot write the log: {reason(error, folder)}; the last checkpoint is kept, "
            "and the same command goes on from it once the disk takes it"
        ) from error


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
