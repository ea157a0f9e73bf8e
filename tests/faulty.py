"""Run main.py with a fault built in: python tests/faulty.py FAULT ... -- WORDS of main.

FAULT: kill=UPDATES (kill -9 before that optimizer step), raise=UPDATES, nan=UPDATES (the MLP of the
first block gives NaN from that step on), count=N (nan: so many steps only), die_early=1 (kill -9
where the process has just joined the others), rank=R (only there),
delay=SECONDS (each step takes longer), settle=1 (a checkpoint is written before the next step),
slow_validation=SECONDS (each batch of it takes longer),
once=FILE (kill, raise: not where FILE exists; it is made),
read=kill | stall (what happens to the reader of the first training image).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from quadmamba.data import FolderImages
from quadmamba.main import main
from quadmamba.utils.launch import run_and_leave
from quadmamba.utils.stepper import Stepper
from quadmamba.utils.watch import Watch
from quadmamba.utils.writer import CheckpointWriter


def install(faults: dict[str, str]) -> None:
    """Wrap the optimizer step and the model of this process."""
    here = "rank" not in faults or faults["rank"] == os.environ.get("RANK", "0")
    init, backward, start = Stepper.__init__, Stepper.backward, Watch.start

    def built(self, model, *args, **kwargs):
        init(self, model, *args, **kwargs)

        def spoil(module, inputs, output):
            del module, inputs
            first = int(faults["nan"])
            bad = model.training and first <= self.updates < first + int(faults.get("count", 999))
            return output * torch.nan if bad else output

        slow = float(faults.get("slow_validation", 0))
        model.register_forward_pre_hook(lambda net, _: time.sleep(0 if net.training else slow))
        if here and "nan" in faults:
            model.stages[0][0].mlp.register_forward_hook(spoil)

    def stepped(self, *args, **kwargs):
        time.sleep(float(faults.get("delay", 0)))
        if here and self.updates == int(faults.get("kill", -1)) and once(faults):
            os.kill(os.getpid(), signal.SIGKILL)
        if here and self.updates == int(faults.get("raise", -1)) and once(faults):
            raise LookupError("a fault on purpose")
        return backward(self, *args, **kwargs)

    def started(self):
        start(self)
        if here and "die_early" in faults:
            os.kill(os.getpid(), signal.SIGKILL)

    Stepper.__init__, Stepper.backward, Watch.start = built, stepped, started
    if "settle" in faults:
        CheckpointWriter.submit = settled(CheckpointWriter.submit)


def spoil_reading(how: str, rank: str) -> None:
    """Let the readers of training images on `rank` die or stall (all ranks where it is empty)."""
    read = FolderImages.__getitem__

    def spoilt(self, draw):
        if how and rank in ("", os.environ["RANK"]) and "train" in self.samples[0][0]:
            time.sleep(999) if how == "stall" else os.kill(os.getpid(), signal.SIGKILL)
        return read(self, draw)

    FolderImages.__getitem__ = spoilt


def settled(submit: Callable[..., None]) -> Callable[..., None]:
    """A `submit` that ends when its checkpoint is on the disk; what fails is told by the next."""

    def submitted(self, *args):
        submit(self, *args)
        while self.busy:
            time.sleep(0.01)

    return submitted


def once(faults: dict[str, str]) -> bool:
    """Whether the fault is still to come."""
    if "once" not in faults:
        return True
    path = Path(faults["once"])
    if path.exists():
        return False
    path.touch()
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    split = sys.argv.index("--")
    faults = dict(word.split("=", 1) for word in sys.argv[1:split])
    install(faults)
    spoil_reading(faults.get("read", ""), faults.get("rank", ""))
    run_and_leave(lambda: main(sys.argv[split + 1 :]))
