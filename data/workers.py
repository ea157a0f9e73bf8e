"""The readers of images: processes, or a thread, that fill memory which this process shares.

The memory belongs to no file system and is there before a worker starts. So a batch needs no place
in /dev/shm, no file descriptor, socket or thread of its own, and nothing can fail on its way. All
waiting is done at one place, which ends it with the reason where a worker has died or stalled.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quadmamba.data.datasets import Batch, FolderImages, collate
from quadmamba.data.folders import shorten
from quadmamba.data.images import DataError, shown

Draws = Sequence[tuple[int, int]]
_SLICE_S = 1.0  # a wait is counted in slices, so that a job that was suspended has not waited
_PARENT_S = 5.0  # between two looks of an idle worker for its parent
_END_S = 2.0  # how long a reader may take to end
_PR_SET_PDEATHSIG = 1
_LIMITS = {
    errno.EAGAIN: "the limit of processes is reached (ulimit -u; docker run --pids-limit)",
    errno.EMFILE: "the limit of open files is reached (ulimit -n)",
    errno.ENFILE: "the limit of open files of this machine is reached",
    errno.ENOMEM: "there is not enough memory",
}
_SHORT_OF_MEMORY = (
    "The kernel does so where memory is short (dmesg tells): lower DATA.WORKERS or "
    "DATA.BATCH_SIZE, or give the job more memory (docker run --memory)."
)
_CRASHED = (
    "A decoder crashed, most likely on this file: repair or remove it. tools/check_data.py finds "
    "such files."
)
_ENDED = "DATA.WORKERS 0 reads in the main process, where what ends a worker is seen."
_NO_DISK = (
    "Look whether the disk or network share answers; raise DATA.TIMEOUT where one image may take "
    "that long."
)


class LoaderError(DataError):
    """Batches do not come: a worker died, stalled or cannot be started. The files may be sound."""


class Slots:
    """Memory for `slots` batches of up to `size` images of `side` squared, shared with workers.

    images: bytes (slots, size, side, side, 3). draws: (slots, size, 2), what to read. begun:
    (readers, 2), how often each reader went on, and the number of the image it reads, or -1.
    """

    def __init__(self, slots: int, size: int, side: int, readers: int) -> None:
        shapes = ((readers, 2), (slots, size, 2))
        words = [8 * int(np.prod(shape)) for shape in shapes]
        pixels = (slots, size, side, side, 3)
        self._memory = mmap.mmap(-1, sum(words) + int(np.prod(pixels)))
        self.begun = np.ndarray(shapes[0], np.int64, self._memory)
        self.draws = np.ndarray(shapes[1], np.int64, self._memory, words[0])
        self.images = torch.from_numpy(np.ndarray(pixels, np.uint8, self._memory, sum(words)))
        self.begun[:, 1] = -1
        self.over = False  # for a reader in this process
        self._locked = False

    def note(self, reader: int, index: int) -> None:
        """Show what a reader is about to read."""
        self.begun[reader] = self.begun[reader, 0] + 1, index

    def lock(self) -> None:
        """Page-lock the images for copies to a GPU. Raises LoaderError where that is refused."""
        code = torch.cuda.cudart().cudaHostRegister(self.images.data_ptr(), self.images.nbytes, 0)
        if int(code):
            raise LoaderError(
                f"DATA.PIN_MEMORY: cannot page-lock {_megabytes(self.images)} for batches (CUDA "
                f"error {int(code)}: {torch.cuda.cudart().cudaGetErrorString(code)}); "
                "DATA.PIN_MEMORY False does without"
            )
        self._locked = True

    def unlock(self) -> None:
        """Undo `lock`, once all copies are done."""
        if self._locked:
            self._locked = False
            with suppress(RuntimeError):  # after an error on the GPU
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(self.images.data_ptr())


class _Read(NamedTuple):
    """A batch that lies in a slot; the images are the first `kept` there."""

    slot: int
    kept: int
    targets: list[int]
    rest: tuple


class _Crash(NamedTuple):
    """What ended a reader. of_machine: no error of the program, but memory or a limit."""

    trace: str
    reason: str
    of_machine: bool


@dataclass
class _Reader:
    """A reader as this process sees it: the end of its line, and what it was asked to read.

    orders: slot and number of images of each batch that has not come yet, the first one first.
    """

    number: int
    line: Connection
    body: BaseProcess | threading.Thread
    orders: deque[tuple[int, int]]


class Workers:
    """Reads batches of `dataset` in `count` processes, or in a thread of this one where it is 0.

    size, side: of the largest batch and of its images. ahead: batches that a process reads before
    they are asked for; a thread reads only while it is waited for. timeout: seconds that a reader
    may take for one image. lock: page-lock the batches for a GPU.
    Raises LoaderError where they cannot be started.
    """

    _owner = 0  # where __init__ did not come to set it

    def __init__(
        self,
        dataset: FolderImages,
        count: int,
        *,
        size: int,
        side: int,
        timeout: float,
        ahead: int = 2,
        lock: bool = False,
    ) -> None:
        self._dataset, self._count, self._timeout = dataset, count, timeout
        self._owner = os.getpid()
        self._readers: list[_Reader] = []
        self._batches = count * ahead + 1
        _running.add(self)
        atexit.unregister(_end_all)  # last in, first out: before multiprocessing waits for them
        atexit.register(_end_all)
        try:
            self._slots = self._make_slots(size, side)
            for number in range(max(1, count)):
                self._start(number)
            if lock:  # after the forks, whose memory it is too
                self._slots.lock()
        except BaseException:
            self.end()
            raise

    def batches(self, draws: Iterable[Draws]) -> Iterator[Batch]:
        """The batch of each of `draws`, in order; its images are overwritten after the next one.

        Raises LoaderError where a reader dies or stalls. Then, and where this iterator is left
        before its end, the workers are of no more use.
        """
        coming, free = iter(draws), list(range(self._batches))
        awaited: deque[tuple[_Reader, int]] = deque()
        self._came: dict[int, _Read] = {}
        number = 0
        while True:
            while free and (batch := next(coming, None)) is not None:
                reader = self._readers[number % len(self._readers)]
                slot = free.pop()
                self._give(reader, slot, batch)
                awaited.append((reader, slot))
                number += 1
            if not awaited:
                return
            read = self._await(*awaited.popleft())
            yield self._unpack(read)
            free.append(read.slot)

    def end(self) -> None:
        """End the readers; one that stalls too."""
        if os.getpid() != self._owner:  # a copy in a worker
            return
        readers, self._readers = self._readers, []
        for reader in readers:
            if isinstance(reader.body, threading.Thread):
                self._slots.over = True
            else:
                reader.body.kill()
            reader.line.close()
        until = time.monotonic() + _END_S
        for reader in readers:
            reader.body.join(max(0.0, until - time.monotonic()))
        if hasattr(self, "_slots"):
            self._slots.unlock()

    def __del__(self) -> None:
        self.end()

    def _make_slots(self, size: int, side: int) -> Slots:
        try:
            return Slots(self._batches, size, side, max(1, self._count))
        except OSError as error:
            wanted = self._batches * size * side * side * 3
            raise LoaderError(
                f"cannot get {wanted / 1e6:.0f} MB of memory for {self._batches} batches: "
                f"{_limit(error)}; lower DATA.WORKERS or DATA.BATCH_SIZE"
            ) from error

    def _start(self, number: int) -> None:
        """Start one reader. Raises LoaderError with the limit that is in the way."""
        try:
            ours, theirs = multiprocessing.Pipe()
            task = number, self._dataset, self._slots, theirs
            if self._count:
                body = multiprocessing.get_context("fork").Process(
                    target=_work,
                    args=(*task, os.getpid(), _in_main_thread()),
                    name=f"loader-{number}",
                    daemon=True,
                )
            else:
                body = threading.Thread(target=_serve, args=task, name="loader", daemon=True)
            body.start()
        except (OSError, RuntimeError) as error:  # a thread that cannot start is a RuntimeError
            raise LoaderError(
                f"DATA.WORKERS: cannot start reader {number + 1} of {max(1, self._count)}: "
                f"{_limit(error)}\nRaise that limit or lower DATA.WORKERS (0 reads in the main "
                "process)."
            ) from error
        if self._count:
            theirs.close()  # so that the death of the worker closes the line
        self._readers.append(_Reader(number, ours, body, deque()))

    def _give(self, reader: _Reader, slot: int, draws: Draws) -> None:
        """Let a reader fill a slot. The message is short, so that this never waits."""
        self._slots.draws[slot, : len(draws)] = draws
        order = slot, len(draws)
        reader.orders.append(order)
        try:
            reader.line.send(order)
        except OSError:
            raise self._died(reader) from None

    def _await(self, reader: _Reader, slot: int) -> _Read:
        """Wait for the batch in a slot, which the reader was asked to read."""
        begun, waited = -1, 0.0
        lines = {reader.line: reader for reader in self._readers}
        slice_s = min(_SLICE_S, self._timeout / 4)
        while slot not in self._came:
            before = time.monotonic()
            for line in wait(lines, slice_s):
                self._receive(lines[line])
            waited += min(time.monotonic() - before, 2 * slice_s)
            if begun != (now := int(self._slots.begun[reader.number, 0])):
                begun, waited = now, 0.0
            if waited >= self._timeout and slot not in self._came:
                raise self._stalled(reader)
        return self._came.pop(slot)

    def _receive(self, reader: _Reader) -> None:
        try:
            message = reader.line.recv()
        except (EOFError, OSError):
            raise self._died(reader) from None
        if isinstance(message, _Crash):
            what = f"{self._name(reader)} failed, {self._occupation(reader)}"
            if message.of_machine:
                raise LoaderError(f"{what}: {message.reason}")
            raise RuntimeError(f"{what}\n{message.trace}")
        reader.orders.popleft()
        self._came[message.slot] = message

    def _unpack(self, read: _Read) -> Batch:
        if not read.kept:
            return Batch(None, None, *read.rest)
        return Batch(
            self._slots.images[read.slot, : read.kept], torch.tensor(read.targets), *read.rest
        )

    def _died(self, reader: _Reader) -> LoaderError:
        """What to say of a reader whose line is closed."""
        reader.body.join(_END_S)
        code = getattr(reader.body, "exitcode", None)
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            hint = _SHORT_OF_MEMORY if -code == signal.SIGKILL else _CRASHED
        else:
            how, hint = f"ended by itself (exit code {code})", _ENDED
        return LoaderError(f"{self._name(reader)} {how}, {self._occupation(reader)}\n{hint}")

    def _stalled(self, reader: _Reader) -> LoaderError:
        """What to say of a reader that has been at one image for too long."""
        return LoaderError(
            f"{self._name(reader)} has read no image for {self._timeout:g} s (DATA.TIMEOUT), "
            f"{self._occupation(reader)}\n{_state(reader)}{_NO_DISK}"
        )

    def _name(self, reader: _Reader) -> str:
        if isinstance(reader.body, threading.Thread):
            return "the loader (DATA.WORKERS 0)"
        return f"loader worker {reader.number + 1} of {self._count} (process {reader.body.pid})"

    def _occupation(self, reader: _Reader) -> str:
        """What a reader does: the file it reads, and some of its batch."""
        begun, index = self._slots.begun[reader.number].tolist()
        if index < 0 and not reader.orders:
            return "while it had nothing to read"
        slot, count = reader.orders[0] if reader.orders else (0, 0)
        paths = [self._dataset.samples[i][0] for i in self._slots.draws[slot, :count, 1]]
        names = shorten([shown("/".join(Path(path).parts[-2:])) for path in paths])
        if index >= 0:
            what = f"reading {shown(self._dataset.samples[index][0])}"
        else:
            what = "between two batches" if begun else "before its first image"
        return f"{what} (batch: {names})" if names else what


_running: weakref.WeakSet[Workers] = weakref.WeakSet()


def leave_signals_to_parent() -> None:
    """In a worker process: a signal to the whole job does not end it before its parent saved."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class _Report:
    """Sends what a block raises to the other end of a line, where it is raised again."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is not None:
            text = "".join(traceback.format_exception(kind, error, trace))
            reason = f"{type(error).__name__}: {_limit(error)}"
            with suppress(OSError):
                of_machine = isinstance(error, MemoryError) or _errno(error) in _LIMITS
                self._line.send(_Crash(text, reason, of_machine))
        return True


def _work(
    number: int,
    dataset: FolderImages,
    slots: Slots,
    line: Connection,
    parent: int,
    to_die_with_it: bool,
) -> None:
    """The life of a worker process."""
    leave_signals_to_parent()
    if to_die_with_it and sys.platform == "linux":  # the death of the thread that forked counts
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    _serve(number, dataset, slots, line, parent)


def _serve(
    number: int, dataset: FolderImages, slots: Slots, line: Connection, parent: int | None = None
) -> None:
    """Fill slots until the line is closed, or `parent` has gone."""
    with _Report(line):
        while _has_order(line, parent):
            try:
                slot, count = line.recv()
            except (EOFError, OSError):
                return
            dataset.on_replace = partial(slots.note, number)
            samples = []
            for epoch, index in slots.draws[slot, :count].tolist():
                if slots.over:
                    return
                slots.note(number, index)
                samples.append(dataset[epoch, index])
            images, targets, *rest = collate(samples, slots.images[slot])
            slots.note(number, -1)
            kept = 0 if images is None else len(images)
            targets = [] if targets is None else targets.tolist()
            line.send(_Read(slot, kept, targets, tuple(rest)))


def _has_order(line: Connection, parent: int | None) -> bool:
    """Wait for an order; False where the parent has gone."""
    while not line.poll(_PARENT_S):
        if parent is not None and os.getppid() != parent:
            return False
    return True


def _end_all() -> None:
    for workers in list(_running):
        workers.end()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _limit(error: BaseException) -> str:
    """An error with the limit of the machine that it stands for."""
    limit = _LIMITS.get(_errno(error))
    return f"{error}: {limit}" if limit else f"{error}"


def _errno(error: BaseException) -> int | None:
    return getattr(error, "errno", None)


def _megabytes(tensor: Tensor) -> str:
    return f"{tensor.nbytes / 1e6:.0f} MB"


def _state(reader: _Reader) -> str:
    """Why a process does not go on, where the kernel tells."""
    with suppress(OSError, AttributeError):
        state = Path(f"/proc/{reader.body.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            return "The process is stopped (kill -CONT lets it go on).\n"
        if state == "D":
            return "The process waits for a disk that does not answer.\n"
    return ""
