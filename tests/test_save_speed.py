"""Training goes on while a checkpoint of 50 million parameters is written."""

import statistics
import time

import torch
from torch import nn

from quadmamba.utils.checkpoint import FORMAT, read
from quadmamba.utils.distributed import World
from quadmamba.utils.stepper import Stepper
from quadmamba.utils.writer import CheckpointWriter

SAVES, STEPS = 3, 16


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
    for step in range(STEPS):
        start = time.perf_counter()
        if step >= 4 and len(saved) < SAVES and not writer.busy:
            writer.submit({"format": FORMAT, "epoch": 0, **stepper.state()}, ["last.pth"])
            saved.append(step)
        busy = writer.busy
        stepper.backward(images, targets, parts=1, last=True)
        stepper.update()
        if step:  # the first one makes the moments
            times[busy].append(time.perf_counter() - start)
    writer.wait()
    during, other = (statistics.median(times[busy]) for busy in (True, False))
    assert read(tmp_path / "last.pth")["updates"] == saved[-1]
    assert len(times[True]) >= len(saved)
    assert during <= 1.2 * other, f"{during:.3f} s of {times[True]}, {other:.3f} s else"
