"""Processes of a run: the device of this one, and what all of them agree on.

NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from quadmamba.utils.launch import CRASH, USER_ERROR, DeviceError, Place
from quadmamba.utils.meeting import Wait, fresh_part, open_store
from quadmamba.utils.watch import Failure, Watch

_SILENCE_S = 60.0  # a rank beats all the time, whatever its main thread waits for
_SHARED_MEMORY = (
    "\n/dev/shm is too small, which the processes of a node share: docker run --shm-size=1g or "
    "--ipc=host gives more, NCCL_SHM_DISABLE=1 does without."
)
_stores: list[dist.Store] = []  # of this process; rank 0's has a server in it, a thread of C++


class RankError(RuntimeError):
    """All ranks stop because of an error, which is the cause of this one on the rank to tell it.

    code: the exit code of this rank.
    """

    def __init__(self, message: str, code: int = USER_ERROR) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class World(Place):
    """This process among those of the run: its place, its device, and words with the others."""

    device: torch.device = torch.device("cpu")

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks, on every rank."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list:
        """The plain `value` of every rank, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self, *errors: type[Exception]) -> Iterator[None]:
        """Run a block without collectives; where it raises one of `errors` on any rank, all stop.

        All raise RankError, whose cause is the error on the lowest failing rank and None on the
        others: one rank tells the reason, and none waits for one that has gone.
        """
        error: Exception | None = None
        try:
            yield
        except errors as caught:
            error = caught
        failed = [rank for rank, bad in enumerate(self.gather(error is not None)) if bad]
        if failed:
            raise RankError(f"rank {failed[0]} failed") from (
                error if failed[0] == self.rank else None
            )


def choose_device(kind: str, place: Place) -> torch.device:
    """The device of this rank: `kind` is auto (a GPU if there is one), cpu or cuda.

    Raises DeviceError, on all ranks of the node alike, where there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cuda" and not count:
        raise DeviceError(
            "DEVICE cuda: expected a GPU, found none; use DEVICE cpu or check the driver"
        )
    if count and place.local_size > count:
        raise DeviceError(
            f"expected at most {count} processes on this node, one per GPU, "
            f"got {place.local_size}; lower --nproc_per_node or use DEVICE cpu; under Slurm ask "
            "with --gpus-per-node, so that a task sees all GPUs of its node"
        )
    return torch.device("cuda", place.local_rank) if count else torch.device("cpu")


@contextmanager
def join(
    place: Place, device: torch.device, errors: tuple[type[Exception], ...], *, timeout: float
) -> Iterator[World]:
    """Enter the process group of a launched run (NCCL or gloo by device) and leave it at the end.

    A rank that leaves the block with an error tells the others: one of `errors` is the user's, any
    other a crash, whose traceback goes to the console of rank 0. A rank that only lost its partner
    in a collective raises RankError without a cause. timeout: seconds that a collective may take.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = World(**asdict(place), device=device)
    if not world.launched:
        yield world
        return
    store = _enter(world, timeout)
    watch = Watch(store, world.rank, world.size, silence=min(timeout, _SILENCE_S))
    watch.start()
    try:
        yield world
        dist.barrier()
        watch.part()
    except RankError:  # all ranks leave; on GPUs the group goes with the process
        _leave_alone(world)
        raise
    except errors as error:
        first = _tell(watch, world, f"{error}", USER_ERROR)
        if first.rank != world.rank:  # a disk may stall for all of them: one message is enough
            raise RankError(f"{error}", first.code) from None
        raise
    except RuntimeError as error:  # of this rank, or of a collective that another one has left
        found = watch.failure_elsewhere()
        if found is None:
            _tell(watch, world, traceback.format_exc(), CRASH)
            raise
        _leave_alone(world)
        raise RankError(f"{error}", found.code) from None
    except Exception:
        _tell(watch, world, traceback.format_exc(), CRASH)
        raise
    else:
        dist.destroy_process_group()
    finally:
        watch.stop()


def _tell(watch: Watch, world: World, text: str, code: int) -> Failure:
    """Report an error of this rank, and leave the others; returns the first failure of the run."""
    first = watch.report(f"rank {world.rank} failed\n{text}", code)
    _leave_alone(world)
    if world.is_main:
        watch.farewell()
    return first


def _leave_alone(world: World) -> None:
    """Leave the group while other ranks may still wait in it; NCCL would wait for them."""
    if world.device.type == "cpu":
        dist.destroy_process_group()


def _enter(world: World, timeout: float) -> dist.Store:
    """Start the process group; returns the store that the ranks share.

    Raises DeviceError where it cannot be started in `timeout` seconds.
    """
    wait, on_gpu = Wait(timeout), world.device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    store = open_store(world, wait)
    _stores.append(store)
    store.set_timeout(timedelta(seconds=timeout))
    try:
        store = fresh_part(store, world, wait)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("run", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout),
            device_id=world.device if on_gpu else None,
        )
    except DeviceError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if any(word in str(error) for word in ("/dev/shm", "shared memory")):
            reason += _SHARED_MEMORY
        raise DeviceError(
            f"rank {world.rank} could not start {backend} with the {world.size} processes that "
            f"meet at {world.host}:{world.port}: {reason}"
        ) from error
    return store
