"""Ranks that watch one another, so that a dead one ends the run with its name.

Every rank beats in the store that all share, and looks at the beat of the rank before it. The first
failure of the run stands in the store too; who sees it leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from quadmamba.utils.launch import CRASH

_FAILED, _SUSPECT, _SEEN, _DONE, _GONE = "failed", "suspect", "seen", "done", "gone"
_BEAT_S = 0.5
_SUSPECT_S = 3.0  # silence that counts as death once a collective has failed
_VERDICT_S = 8.0  # how long to wait for the name of the rank that broke a collective
_LEAVE_S = 10.0  # how long the main thread may take to leave after a failure elsewhere


@dataclass(frozen=True)
class Failure:
    """What ended the run: the rank, what it said, and the exit code of all ranks."""

    rank: int
    text: str
    code: int


class Watch:
    """The watching thread of one rank.

    silence: seconds without a beat after which a rank counts as dead.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, *, silence: float) -> None:
        self._store = store.clone()  # a connection of its own: others may wait in theirs
        self._rank, self._size, self._silence = rank, size, silence
        self._host = socket.gethostname()
        self._over = threading.Event()
        self._known = threading.Event()
        self._failure: Failure | None = None
        self._heard = ("", time.monotonic())
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to beat and to watch. A rank that dies later has beaten once."""
        with contextlib.suppress(RuntimeError):  # the store has gone: the thread says so
            self._beat(0)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def report(self, text: str, code: int, rank: int | None = None) -> Failure:
        """Tell all ranks that `rank` (this one) ends the run; returns the one that came first."""
        rank = self._rank if rank is None else rank
        entry = json.dumps({"rank": rank, "text": text, "code": code})
        return Failure(**json.loads(self._store.compare_set(_FAILED, "", entry)))

    def farewell(self) -> None:
        """Let the others read the report before the store may go with this process."""
        self._await(_SEEN, self._size - 1)

    def part(self) -> None:
        """Wait until all ranks have come here; the one that may hold the store leaves last."""
        self._store.add(_DONE, 1)
        self._await(_DONE, self._size)
        self._store.add(_GONE, 1)
        if self._rank == 0:
            self._await(_GONE, self._size)

    def _await(self, key: str, count: int) -> None:
        end = time.monotonic() + _VERDICT_S
        while time.monotonic() < end and self._store.add(key, 0) < count:
            time.sleep(_BEAT_S / 10)

    def failure_elsewhere(self) -> Failure | None:
        """After a failed collective: the failure on another rank that explains it, if there is."""
        self._store.set(_SUSPECT, "1")
        self._known.wait(_VERDICT_S)
        return self._failure if self._failure and self._failure.rank != self._rank else None

    def _run(self) -> None:
        beats = 0
        try:
            while not self._over.wait(_BEAT_S):
                beats += 1
                self._beat(beats)
                if self._store.check([_FAILED]):
                    self._learn()
                    return
                self._listen((self._rank - 1) % self._size)
        except RuntimeError as error:  # the store has gone, and rank 0 or its launcher with it
            if not self._over.wait(_LEAVE_S):
                self._leave(f"rank {self._rank} lost the store of the run: {error}", CRASH)

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self._rank}", f"{number} {self._host}")

    def _listen(self, rank: int) -> None:
        """Report `rank` where it has not beaten for too long."""
        if rank == self._rank or not self._store.check([f"beat/{rank}"]):
            return
        beat, now = self._store.get(f"beat/{rank}").decode(), time.monotonic()
        if beat != self._heard[0]:
            self._heard = (beat, now)
        limit = _SUSPECT_S if self._store.check([_SUSPECT]) else self._silence
        if now - self._heard[1] > limit:
            host = beat.partition(" ")[2]
            text = f"rank {rank} on {host} died: no sign of life for {now - self._heard[1]:.0f} s"
            self.report(text, CRASH, rank)

    def _learn(self) -> None:
        """Read the failure, tell it where this rank has to, and see that the process ends."""
        self._failure = failure = Failure(**json.loads(self._store.get(_FAILED)))
        self._store.add(_SEEN, int(failure.rank != self._rank))
        teller = 0 if failure.rank else 1
        if failure.code == CRASH and self._rank == teller:
            sys.stderr.write(f"error: {failure.text}\n")
            sys.stderr.flush()
        self._known.set()
        if not self._over.wait(_LEAVE_S):
            self._leave("", failure.code)

    def _leave(self, text: str, code: int) -> None:
        """End the process: its main thread waits for a rank that will not answer."""
        sys.stderr.write(f"{text}\n" if text else "")
        sys.stderr.flush()
        os._exit(code)
