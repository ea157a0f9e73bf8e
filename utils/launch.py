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

from quadmamba.utils.console import lasting_console

# Exit codes of the program
CRASH, USER_ERROR, STOPPED = 1, 2, 3
_TORCHRUN, _SLURM = "RANK", "SLURM_STEP_NUM_TASKS"  # variables of the launchers


class DeviceError(RuntimeError):
    """The device or the process layout that was asked for does not exist here."""


@dataclass(frozen=True)
class Place:
    """The place of this process among those of the run.

    rank, size: over all nodes. local_rank, local_size: on this node. launched: a launcher started
    it, so there is a process group. host, port: where its processes meet.
    """

    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    size: int = 1
    launched: bool = False
    host: str = ""
    port: int = 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that reports and writes."""
        return self.rank == 0


def place_from_env(env: Mapping[str, str] = os.environ) -> Place:
    """The place that torchrun's variables or those of a Slurm step tell; else that of a run of one.

    Raises DeviceError where a variable is missing, is not a number, or contradicts another one.
    """
    if _TORCHRUN in env:
        names = (_TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
        numbers = [_number(env, name) for name in names]
        host, port = _given(env, "MASTER_ADDR"), _number(env, "MASTER_PORT")
    elif _SLURM in env:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", _SLURM)
        numbers = [_number(env, name) for name in names if "TASKS_PER" not in name]
        numbers.insert(2, _tasks_here(env, names[2]))
        host, port = _slurm_address(env)
    else:
        return Place()
    rank, local_rank, local_size, size = numbers
    named = dict(zip(names, numbers))
    for low, high in ((names[0], names[3]), (names[1], names[2])):
        if named[low] >= named[high]:
            raise DeviceError(
                f"{low}: expected a number below {high} {named[high]}, got {named[low]}"
            )
    if local_size > size:
        raise DeviceError(f"{names[2]}: expected at most {names[3]} {size}, got {local_size}")
    if not 0 < port < 1 << 16:
        raise DeviceError(f"MASTER_PORT: expected a port from 1 to 65535, got {port}")
    return Place(rank, local_rank, local_size, size, True, host.strip("[]"), port)


def _given(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "").strip()
    if not value:
        raise DeviceError(
            f"the environment variable {name} is not set, or empty, though a launcher's variables "
            "are; start with python, torchrun or srun"
        )
    return value


def _number(env: Mapping[str, str], name: str) -> int:
    value = _given(env, name)
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise DeviceError(
            f"{name}: expected a number of 0 or more in this environment variable, got {value!r}"
        )
    return int(value)


def _tasks_here(env: Mapping[str, str], name: str) -> int:
    """Tasks on this node of a Slurm step: "4(x2),3" is 4, 4 and 3 on its nodes."""
    counts: list[int] = []
    for part in _given(env, name).split(","):
        found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if not found:
            raise DeviceError(f"{name}: expected tasks of nodes as 4(x2),3, got {env[name]!r}")
        counts += [int(found[1])] * min(int(found[2] or 1), 1 << 16)
    node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    return counts[min(node, len(counts) - 1)]


def _slurm_address(env: Mapping[str, str]) -> tuple[str, int]:
    """The first host of the step and a port made of its numbers, where the user gave none."""
    host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    if env.get("MASTER_PORT"):
        return host, _number(env, "MASTER_PORT")
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    job, step = (int(env[name]) if env.get(name, "").isdecimal() else 0 for name in names)
    return host, 20000 + (job + 97 * step) % 10000


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "node[003-005,9]-ib,login1" -> "node003-ib"."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


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
    if not {_TORCHRUN, _SLURM} & set(os.environ):
        sys.exit(program())
    code = CRASH
    with lasting_console():
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
