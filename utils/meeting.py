"""Where the processes of one start find one another: a store, which may outlive them.

A launcher that restarts a job keeps its store, and with it the addresses and failures of the
processes before; whoever reads these connects to the dead.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from quadmamba.utils.launch import DeviceError, Place

_POLL_S, _FIRST_WORD_S, _NEXT_WORD_S = 0.05, 3.0, 30.0
_CONNECT_S = 5.0
_NAMED = 8  # missing ranks that are named


class Wait:
    """Waiting for other processes for so many seconds at most, with a word where it takes long."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds, self._word = time.monotonic(), seconds, _FIRST_WORD_S

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._start + self._seconds - time.monotonic()

    def step(self, what: Callable[[], str]) -> bool:
        """Wait a little; False where no time is left. what: tells what is waited for, or ""."""
        waited = time.monotonic() - self._start
        if waited >= self._word:
            self._word = waited + _NEXT_WORD_S
            if text := what():
                limit = f"{waited:.0f} of {self._seconds:.0f} s (RANK_TIMEOUT)"
                sys.stderr.write(f"waiting for {text}: {limit}\n")
                sys.stderr.flush()
        time.sleep(max(0.0, min(_POLL_S, self.left)))
        return self.left > 0


def open_store(place: Place, wait: Wait) -> dist.Store:
    """The store at the address of the run; rank 0 holds it where the launcher does not.

    Raises DeviceError where the port cannot be had, or nobody answers in time.
    """
    at, held = f"{place.host}:{place.port}", None
    options = {"wait_for_workers": False, "timeout": timedelta(seconds=max(1.0, wait.left))}
    if place.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            socket.create_server(("", place.port)).close()  # says why not, in one line
            held = dist.TCPStore("localhost", place.port, is_master=True, **options)
        except (OSError, RuntimeError) as error:
            raise DeviceError(
                f"MASTER_PORT: cannot listen on port {place.port}: {_reason(error)}; is another "
                "run or program there? Choose another port"
            ) from error
    while reason := _unreachable(place.host, place.port):
        if not wait.step(lambda reason=reason: f"the store at {at} (rank 0): {reason}"):
            raise DeviceError(
                f"rank {place.rank} found no store at MASTER_ADDR:MASTER_PORT {at} in the time of "
                f"RANK_TIMEOUT: {reason}. {_hint(place)}"
            )
    try:
        return dist.TCPStore(place.host, place.port, **options) if held is None else held
    except RuntimeError as error:
        raise DeviceError(
            f"no store of a run answers at MASTER_ADDR:MASTER_PORT {at}: {_reason(error)}; does "
            "another program use the port?"
        ) from error


def _unreachable(host: str, port: int) -> str:
    """Why nobody answers at an address, "" where somebody does."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # a name that cannot be one is a UnicodeError
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.partition("\n")[0].partition(" (while")[0]


def _hint(place: Place) -> str:
    """How to run alone, for those who did not mean to start several processes."""
    return (
        f"This process is rank {place.rank} of {place.size} by its environment variables; one that "
        "is to run alone must have neither RANK nor SLURM_STEP_NUM_TASKS"
    )


def fresh_part(store: dist.Store, place: Place, wait: Wait) -> dist.Store:
    """A part of `store` that is used by the processes of this start alone.

    Each process shows a name that it just made up. Rank 0 offers a part to the names that it sees,
    until all of them have taken up the offer; a process takes up only one that has its own name.
    Raises DeviceError where not all come in time, or they do not fit together.
    """
    name = f"{uuid.uuid4().hex} {place.size}"
    store.set(_name_of(place.rank), name)

    def word() -> str:
        return _missing(store, place) if _is_first(store, place) else ""

    while True:
        part = _lead(store, name, place) if place.is_main else _follow(store, name, place)
        if part:
            return dist.PrefixStore(part, store)
        if not wait.step(word):
            raise DeviceError(
                f"rank {place.rank}: expected {place.size} processes in the time of RANK_TIMEOUT, "
                f"still waiting for {_missing(store, place)}. {_hint(place)}"
            )


def _name_of(rank: int) -> str:
    return f"meet/name/{rank}"


def _is_first(store: dist.Store, place: Place) -> bool:
    """Whether no lower rank is here: one of those that wait tells for what."""
    return not any(store.check([_name_of(rank)]) for rank in range(place.rank))


def _missing(store: dist.Store, place: Place) -> str:
    """Which processes are not here, and what is odd about those that are."""
    there = [rank for rank in range(place.size) if store.check([_name_of(rank)])]
    absent = sorted(set(range(place.size)) - set(there))
    sizes = {rank: int(store.get(_name_of(rank)).split()[1]) for rank in there}
    others = [f"rank {rank} has WORLD_SIZE {n}" for rank, n in sizes.items() if n != place.size]
    what = f"missing ranks {_list(absent)}" if absent else "answers of all ranks"
    count = f"{len(there)} of {place.size} processes here"
    return ", ".join([f"{what} at {place.host}:{place.port}", count, *others[:1]])


def _list(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ", ".join(map(str, ranks[:_NAMED])) + more


def _lead(store: dist.Store, name: str, place: Place) -> str:
    """Offer a part to all that have shown a name; returns it once all have taken it up."""
    keys = [_name_of(rank) for rank in range(place.size)]
    if not store.check(keys):
        return ""
    names = [store.get(key).decode() for key in keys]
    part = name.split()[0]
    store.set("meet/offer", json.dumps({"part": part, "names": names}))
    if store.check([_refusal(part)]):
        raise DeviceError(store.get(_refusal(part)).decode())
    taken = [f"meet/taken/{part}/{rank}" for rank in range(1, place.size)]
    return part if not taken or store.check(taken) else ""


def _refusal(part: str) -> str:
    return f"meet/refused/{part}"


def _follow(store: dist.Store, name: str, place: Place) -> str:
    """Take up an offer to `name`; returns its part."""
    if store.get(_name_of(place.rank)).decode() != name:
        raise DeviceError(f"expected one process of each rank, got two of rank {place.rank}")
    if not store.check(["meet/offer"]):
        return ""
    offer = json.loads(store.get("meet/offer"))
    if name not in offer["names"]:
        return ""
    if len(offer["names"]) != place.size:
        text = (
            f"expected one number of processes on all ranks, got {len(offer['names'])} on rank 0 "
            f"and {place.size} on rank {place.rank} (WORLD_SIZE)"
        )
        store.set(_refusal(offer["part"]), text)
        raise DeviceError(text)
    store.set(f"meet/taken/{offer['part']}/{place.rank}", "1")
    return offer["part"]
