"""Training goes on while a checkpoint of 50 million parameters is written."""

import statistics
import time

import torch
from torch import nn

from quadmamba.utils.checkpoint import FORMAT, read
from quadmamba.utils.distributed import World
from quadmamba.utils.stepper import Stepper
from quadmamba.utils.writer import CheckpointWriter

SAVES, QUIET, MOST = 3, 4, 80  # quiet steps before each save and after the last one; steps in all


def test_steps_during_a_save_take_at_most_a_fifth_longer(tmp_path):
    torch.set_num_threads(1)  # the other core is for the writer
    model = nn.Sequential(
        *(layer for _ in range(8) for layer in (nn.Linear(2500, 2500), nn.GELU()))
    )
    assert sum(param.numel() for param in model.parameters()) > 50e6
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    stepper = Stepper(model, optimizer, nn.CrossEntropyLoss(), world=World(), ema_decay=0.9)
    images, targets = torch.randn(128, 2500), torch.randint(2500, (128,))
    writer = CheckpointWriter(tmp_path, keep=1)
    times: dict[bool, list[float]] = {True: [], False: []}
    saved: list[int] = []
    quiet = -1  # steps since the last save; the very first one makes the moments
    for step in range(MOST):
        start = time.perf_counter()
        if quiet == QUIET:
            if len(saved) == SAVES:
                break
            writer.submit({"format": FORMAT, "epoch": 0, **stepper.state()}, ["last.pth"])
            saved.append(step)
        busy = writer.busy
        stepper.backward(images, targets, parts=1, last=True)
        stepper.update()
        if step:
            times[busy].append(time.perf_counter() - start)
        quiet = 0 if busy else quiet + 1
    writer.wait()
    during, other = (statistics.median(times[busy]) for busy in (True, False))
    assert read(tmp_path / "last.pth")["updates"] == saved[-1]
    assert len(times[True]) >= len(saved) == SAVES
    assert during <= 1.2 * other, f"{during:.3f} s of {times[True]}, {other:.3f} s else"
