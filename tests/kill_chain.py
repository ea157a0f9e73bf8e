"""One run in many lives: python tests/kill_chain.py SEED KILLS REPORT -- WORDS of main.

Each life is a fork of this process (so that nothing is imported twice) and is killed by kill -9 at
a random moment: of a step, of a byte of a checkpoint that is being written, or of a renaming. The
life after the last kill runs to its end. REPORT gets the places of the kills, one a line.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from quadmamba.main import main
from quadmamba.utils import writer
from quadmamba.utils.stepper import Stepper


def die(report: Path, place: str) -> None:
    """Write down the place and end this process at once."""
    with report.open("a") as file:
        file.write(f"{place}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(rng: random.Random, report: Path) -> None:
    """Die some time after the start of the 2nd or 3rd step."""
    start, delay = rng.randint(2, 3), rng.uniform(0, 0.03)
    backward, calls = Stepper.backward, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == start:
            threading.Thread(target=lambda: (time.sleep(delay), die(report, "step"))).start()
        return backward(self, *args, **kwargs)

    Stepper.backward = counted


def in_a_write(rng: random.Random, report: Path) -> None:
    """Die after a random byte of the 2nd checkpoint."""
    left = rng.randint(1, 250_000)  # one has about 600,000
    saves, write, save = [], writer._Hashing.write, writer.save

    def counted_save(*args, **kwargs):
        saves.append(1)
        save(*args, **kwargs)

    def counted_write(self, data):
        nonlocal left
        if len(saves) >= 2 and (left := left - len(data)) < 0:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die(report, "write")
        return write(self, data)

    writer.save, writer._Hashing.write = counted_save, counted_write


def in_a_renaming(rng: random.Random, report: Path) -> None:
    """Die before a random one of the renamings of the 2nd or 3rd checkpoint."""
    left, replace = rng.randint(4, 9), Path.replace

    def counted(self, target):
        nonlocal left
        if (left := left - 1) == 0:
            die(report, "rename")
        return replace(self, target)

    Path.replace = counted


WAYS: tuple[Callable[[random.Random, Path], None], ...] = (in_a_step, in_a_write, in_a_renaming)


def live(words: list[str], fault: Callable[[], None] | None) -> int:
    """One life in a fork; its wait status."""
    pid = os.fork()
    if pid == 0:
        if fault is not None:
            fault()
        code = main(words)
        sys.stdout.flush()
        os._exit(code)
    return os.waitpid(pid, 0)[1]


def chain(seed: int, kills: int, report: Path, words: list[str]) -> int:
    """Live and die so often, then live to the end; the exit code of the last life."""
    for number in range(kills):
        rng = random.Random(f"{seed} {number}")
        way = WAYS[number % len(WAYS)]
        status = live(words, lambda way=way, rng=rng: way(rng, report))
        if not os.WIFSIGNALED(status):
            sys.stderr.write(f"life {number} was not killed: status {status}\n")
            return 1
    return os.waitstatus_to_exitcode(live(words, None))


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed, kills, report = sys.argv[1:4]
    sys.exit(chain(int(seed), int(kills), Path(report), sys.argv[sys.argv.index("--") + 1 :]))
