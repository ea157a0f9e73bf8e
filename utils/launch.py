"""How this process was started, and how it ends. Needs no torch: it speaks before torch is there.

One entry for plain python, torchrun, torch.distributed.launch and srun: rank, local rank and world
size come from the environment.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

# Exit codes of the program
CRASH, USER_ERROR, STOPPED = 1, 2, 3
_MARKS = ("RANK", "SLURM_STEP_NUM_TASKS")  # variables of a launcher


class DeviceError(RuntimeError):
    """The device or the process layout that was asked for does not exist here."""


@dataclass(frozen=True)
class Place:
    """The place of this process among those of the run.

    rank, size: over all nodes. local_rank, local_size: on this node. launched: a launcher started
    it, so there is a process group.
    """

    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    size: int = 1
    launched: bool = False

    @property
    def is_main(self) -> bool:
        """True on the one rank that reports and writes."""
        return self.rank == 0


def place_from_env(env: Mapping[str, str] = os.environ) -> Place:
    """Rank, local rank and sizes from torchrun's variables or a Slurm step's; else a run of one.

    Raises DeviceError where a variable is missing or is not a number.
    """
    names = (
        ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"),
        (
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_STEP_TASKS_PER_NODE",
            "SLURM_STEP_NUM_TASKS",
        ),
    )
    for mark, variables in zip(_MARKS, names):
        if mark in env:
            rank, local_rank, local_size, size = (_number(env, name) for name in variables)
            return Place(rank, local_rank, local_size, size, launched=True)
    return Place()


def _number(env: Mapping[str, str], name: str) -> int:
    found = re.match(r"\d+", env.get(name, ""))  # Slurm writes tasks per node as "4(x2)"
    if not found:
        raise DeviceError(
            f"expected a number in the environment variable {name}, got {env.get(name)!r}; "
            "start with python, torchrun or srun"
        )
    return int(found[0])


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "node[003-005,9],login1" -> "node003"."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?", nodes)
    return found[1] + (found[2] or "") if found else nodes


def stop(error: BaseException | None) -> int:
    """Tell the user what is wrong, if there is something to tell; the exit code."""
    if error is not None:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
    return USER_ERROR


def run_and_leave(program: Callable[[], int]) -> NoReturn:
    """Run `program` and end the process with the exit code that it returns.

    A launched process does all but take the interpreter down: threads of the store and of the group
    may still run in C++ there, and end it by an abort ("terminate called without an active
    exception") when all has been done and said.
    """
    if not any(mark in os.environ for mark in _MARKS):
        sys.exit(program())
    code = CRASH
    try:
        code = program()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else CRASH
    finally:
        if sys.exc_info()[1] is not None:
            sys.excepthook(*sys.exc_info())
        threading._shutdown()  # a checkpoint that is being written is written to its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
