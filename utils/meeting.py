"""Where the processes of one start meet in a store that may outlive them.

A launcher that restarts a job keeps its store, and with it the addresses and failures of the
processes before; whoever reads these connects to the dead.
"""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

_POLL_S = 0.05


def fresh_part(store: dist.Store, rank: int, size: int, *, timeout: float) -> dist.Store:
    """A part of `store` that is used by the `size` processes of this start alone.

    Each process shows a name that it just made up. Rank 0 offers a part to the names that it sees,
    until all of them have taken up the offer; a process takes up only one that has its own name.
    Raises RuntimeError where not all come within `timeout` seconds.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"meet/name/{rank}", name)
    while time.monotonic() < end:
        part = _lead(store, name, size) if rank == 0 else _follow(store, name, rank)
        if part:
            return dist.PrefixStore(part, store)
        time.sleep(_POLL_S)
    raise RuntimeError(
        f"rank {rank}: expected {size} processes within {timeout:.0f} s, not all came"
    )


def _lead(store: dist.Store, part: str, size: int) -> str:
    """Offer `part` to all that have shown a name; returns it once all have taken it up."""
    keys = [f"meet/name/{rank}" for rank in range(size)]
    if not store.check(keys):
        return ""
    names = [store.get(key).decode() for key in keys]
    store.set("meet/offer", json.dumps({"part": part, "names": names}))
    taken = [f"meet/taken/{part}/{rank}" for rank in range(1, size)]
    return part if not taken or store.check(taken) else ""


def _follow(store: dist.Store, name: str, rank: int) -> str:
    """Take up an offer to `name`; returns its part."""
    if not store.check(["meet/offer"]):
        return ""
    offer = json.loads(store.get("meet/offer"))
    if name not in offer["names"]:
        return ""
    store.set(f"meet/taken/{offer['part']}/{rank}", "1")
    return offer["part"]
