"""Two runs that start into one folder at the same moment: python tests/meet.py ROUNDS OUT -- WORDS.

WORDS of main have TRAIN.EPOCHS 1 and DATA.WORKERS, and no output folder. Each round has one of its
own in OUT. Its runs are forks of this process, so that nothing is imported twice: two meet right
before the lock of the folder; a third one goes on there in more epochs, and is killed by kill -9 in
its second step, with its loader processes left behind; a fourth one starts right after that. Prints
the exit codes of each round as a JSON list; what the runs say goes to files beside the folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from quadmamba.main import main
from quadmamba.utils.lock import FolderLock
from quadmamba.utils.stepper import Stepper


def live(words: list[str], said: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start a run in a fork, its output to the file `said`; returns its process id."""
    pid = os.fork()
    if pid == 0:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        before()
        os._exit(main(words))
    return pid


def code_of(pid: int) -> int:
    """The exit code of a run, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def meet(barrier: multiprocessing.Barrier) -> None:
    """Let this process wait for the other one right before it locks and right after that."""
    init = FolderLock.__init__

    def together(self, folder: Path) -> None:
        barrier.wait(60)
        try:
            init(self, folder)
        finally:
            barrier.wait(60)

    FolderLock.__init__ = together


def die_in_the_second_step() -> None:
    """Let this process kill itself there."""
    backward, calls = Stepper.backward, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(self, *args, **kwargs)

    Stepper.backward = counted


def play(out: Path, words: list[str]) -> list[int]:
    """One round; the exit codes of its four runs."""
    out.mkdir(parents=True)
    words = ["--output", str(out), *words]
    barrier = multiprocessing.get_context("fork").Barrier(2)
    pids = [live(words, out / f"{i}.txt", lambda: meet(barrier)) for i in range(2)]
    codes = [code_of(pid) for pid in pids]
    more = list(words)
    for key, value in {"TRAIN.EPOCHS": "2", "DATA.WORKERS": "1"}.items():
        more[more.index(key) + 1] = value
    codes.append(code_of(live(more, out / "2.txt", die_in_the_second_step)))
    codes.append(code_of(live(more, out / "3.txt")))
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    rounds, out = int(sys.argv[1]), Path(sys.argv[2])
    words = sys.argv[sys.argv.index("--") + 1 :]
    json.dump([play(out / str(number), words) for number in range(rounds)], sys.stdout)
