"""The readers of images: processes, or a thread, that fill memory which this process shares.

The memory belongs to no file system and is there before a worker starts. So a batch needs no place
in /dev/shm, no file descriptor, socket or thread of its own, and nothing can fail on its way. All
waiting is done at one place, which ends it with the reason where a worker has died or stalled.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from quadmamba.data.datasets import Batch, FolderImages
from quadmamba.data.folders import shorten
from quadmamba.data.images import shown
from quadmamba.data.patience import LoaderError, Patience
from quadmamba.data.reader import Crash, Read, explained, serve, work
from quadmamba.data.slots import Slots

Draws = Sequence[tuple[int, int]]
_END_S = 2.0  # how long a reader may take to end
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
        self._came: dict[int, Read] = {}
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
            if reader.body.is_alive():  # it waits for a disk; nobody waits for it at exit
                multiprocessing.process._children.discard(reader.body)
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
                f"{explained(error)}; lower DATA.WORKERS or DATA.BATCH_SIZE"
            ) from error

    def _start(self, number: int) -> None:
        """Start one reader. Raises LoaderError with the limit that is in the way."""
        try:
            ours, theirs = multiprocessing.Pipe()
            task = number, self._dataset, self._slots, theirs
            if self._count:
                body = multiprocessing.get_context("fork").Process(
                    target=work,
                    args=(*task, os.getpid(), _in_main_thread()),
                    name=f"loader-{number}",
                    daemon=True,
                )
            else:
                body = threading.Thread(target=serve, args=task, name="loader", daemon=True)
            body.start()
        except (OSError, RuntimeError) as error:  # a thread that cannot start is a RuntimeError
            raise LoaderError(
                f"DATA.WORKERS: cannot start reader {number + 1} of {max(1, self._count)}: "
                f"{explained(error)}\nRaise that limit or lower DATA.WORKERS (0 reads in the main "
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
            while True:  # until its last words, or its death, are raised
                self._receive(reader)

    def _await(self, reader: _Reader, slot: int) -> Read:
        """Wait for the batch in a slot, which the reader was asked to read."""
        lines = {reader.line: reader for reader in self._readers}
        patience = Patience(self._timeout)
        while slot not in self._came:
            for line in wait(lines, patience.slice_s):
                self._receive(lines[line])
            over = patience.is_over(int(self._slots.begun[reader.number, 0]))
            if over and slot not in self._came:
                raise self._stalled(reader)
        return self._came.pop(slot)

    def _receive(self, reader: _Reader) -> None:
        try:
            message = reader.line.recv()
        except (EOFError, OSError):
            raise self._died(reader) from None
        if isinstance(message, Crash):
            what = f"{self._name(reader)} failed, {self._occupation(reader)}"
            if message.of_machine:
                raise LoaderError(f"{what}: {message.reason}")
            raise RuntimeError(f"{what}\n{message.trace}")
        reader.orders.popleft()
        self._came[message.slot] = message

    def _unpack(self, read: Read) -> Batch:
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


def _end_all() -> None:
    for workers in list(_running):
        workers.end()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _state(reader: _Reader) -> str:
    """Why a process does not go on, where the kernel tells."""
    with suppress(OSError, AttributeError):
        state = Path(f"/proc/{reader.body.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            return "The process is stopped (kill -CONT lets it go on).\n"
        if state == "D":
            return "The process waits for a disk that does not answer.\n"
    return ""
