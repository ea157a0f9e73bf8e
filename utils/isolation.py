"""Work on items in processes that may die or hang: what is lost is named, the rest goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
_ALIVE_EVERY = 5  # seconds after which an idle process looks whether its parent lives


@dataclass(frozen=True)
class Lost:
    """What stands for the result of an item whose process was lost: why, and if it was too slow."""

    reason: str
    slow: bool = False


class _Worker:
    """One process, and the item that it works on."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(other, function), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process closes the pipe
        self.item: Any = None
        self.since = 0.0

    def give(self, item: object) -> None:
        self.item, self.since = item, time.monotonic()
        with contextlib.suppress(ConnectionError):  # its end is noticed where it is waited for
            self.pipe.send(item)

    def end(self, *, grace: float = 0) -> int | None:
        """End the process, after `grace` seconds in which it may end by itself; its exit code."""
        self.process.join(grace)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def map_isolated(
    function: Callable[[Item], Any], items: Sequence[Item], *, workers: int, timeout: float
) -> Iterator[tuple[Item, Any]]:
    """(item, function(item)) in the order in which they are done, each in one of `workers`.

    Lost stands for the result where a process took longer than `timeout` seconds, or died twice
    at the same item: again when it was alone, as a machine without memory kills any process.
    """
    again: list[Item] = []
    for item, result in _pass(function, items, min(workers, max(1, len(items))), timeout):
        if isinstance(result, Lost) and not result.slow:
            again.append(item)
        else:
            yield item, result
    for item in again:
        yield from _pass(function, [item], 1, timeout)


def _pass(
    function: Callable[[Item], Any], items: Sequence[Item], workers: int, timeout: float
) -> Iterator[tuple[Item, Any]]:
    waiting = deque(items)
    team = [_Worker(function) for _ in range(workers)]
    try:
        for worker in team:
            if waiting:
                worker.give(waiting.popleft())
        while busy := [worker for worker in team if worker.item is not None]:
            ready = wait([worker.pipe for worker in busy], timeout=1)
            for worker in busy:
                overdue = time.monotonic() - worker.since > timeout
                if worker.pipe not in ready and not overdue:
                    continue
                item, result = worker.item, _result(worker, timeout, worker.pipe in ready)
                if isinstance(result, Lost):
                    team.remove(worker)
                    team.append(worker := _Worker(function))
                worker.item = None
                if waiting:
                    worker.give(waiting.popleft())
                yield item, result
    finally:
        for worker in team:
            worker.end()


def _result(worker: _Worker, timeout: float, ready: bool) -> object:
    """What the process sent; Lost where it ended or is too slow, after which it is gone."""
    if not ready:
        worker.end()
        return Lost(f"takes longer than {timeout:g} seconds", slow=True)
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionError):
        code = worker.end(grace=5) or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Lost(f"ended the process that read it ({how})")


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """In the process: results for items, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    parent = os.getppid()
    while os.getppid() == parent:
        if pipe.poll(_ALIVE_EVERY):
            try:
                item = pipe.recv()
            except EOFError:
                return
            pipe.send(function(item))
