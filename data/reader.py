"""The other side of `Workers`: what a worker process, or the thread in its place, does."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import traceback
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from quadmamba.data.datasets import FolderImages, collate
from quadmamba.data.patience import Caught
from quadmamba.data.slots import Slots

_PARENT_S = 5.0  # between two looks of an idle worker for its parent
_PR_SET_PDEATHSIG = 1
_LIMITS = {
    errno.EAGAIN: "the limit of processes is reached (ulimit -u; docker run --pids-limit)",
    errno.EMFILE: "the limit of open files is reached (ulimit -n)",
    errno.ENFILE: "the limit of open files of this machine is reached",
    errno.ENOMEM: "there is not enough memory",
}


class Read(NamedTuple):
    """A batch that lies in a slot; the images are the first `kept` there."""

    slot: int
    kept: int
    targets: list[int]
    rest: tuple


class Crash(NamedTuple):
    """What ended a reader. of_machine: no error of the program, but memory or a limit."""

    trace: str
    reason: str
    of_machine: bool


def leave_signals_to_parent() -> None:
    """In a worker process: a signal to the whole job does not end it before its parent saved."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def work(
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
    serve(number, dataset, slots, line, parent)


def serve(
    number: int, dataset: FolderImages, slots: Slots, line: Connection, parent: int | None = None
) -> None:
    """Fill slots until the line is closed, or `parent` has gone; report what is raised."""
    with Caught() as caught:
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
            line.send(Read(slot, kept, targets, tuple(rest)))
    if caught.error is not None:
        with suppress(OSError):
            line.send(_crash(caught.error))


def _crash(error: BaseException) -> Crash:
    text = "".join(traceback.format_exception(error))
    of_machine = isinstance(error, MemoryError) or _errno(error) in _LIMITS
    return Crash(text, f"{type(error).__name__}: {explained(error)}", of_machine)


def _has_order(line: Connection, parent: int | None) -> bool:
    """Wait for an order; False where the parent has gone."""
    while not line.poll(_PARENT_S):
        if parent is not None and os.getppid() != parent:
            return False
    return True


def explained(error: BaseException) -> str:
    """An error with the limit of the machine that it stands for."""
    limit = _LIMITS.get(_errno(error))
    return f"{error}: {limit}" if limit else f"{error}"


def _errno(error: BaseException) -> int | None:
    return getattr(error, "errno", None)
