"""An epoch beside the same one by hand: which batches make a step, what each of them draws, the
average of the weights, and where a run with another layout goes on.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_engine import batch, make_stepper, weights
from torch import nn

from quadmamba.configs import load_cfg
from quadmamba.utils import engine, writer
from quadmamba.utils.distributed import World
from quadmamba.utils.logging import RunLog
from quadmamba.utils.progress import Progress, Window
from quadmamba.utils.resume import _take_ranks
from quadmamba.utils.signals import StopRequest


def pictures(seed):
    """A batch of four pictures of one pixel with six channels."""
    images, targets = batch(4, seed=seed)
    return images[:, :, None, None], targets


class Batches:
    """Seven batches of four, as a loader whose sampler leaves out what was seen."""

    count = 7

    def __init__(self):
        self.sampler, self.seen = self, 0

    def set_epoch(self, _, seen):
        self.seen = seen // 4

    def __len__(self):
        return self.count - self.seen

    def __iter__(self):
        return map(pictures, range(self.seen, self.count))


def make_run(accum, *, start=0, rank=0, mixup=None, head=None, **options):
    """A run that goes on after `start` batches, and the configuration of it."""
    opts = ["TRAIN.ACCUM_STEPS", str(accum), "DATA.BATCH_SIZE", "4", "TRAIN.SAVE_MINUTES", "0"]
    cfg = load_cfg(opts=[*opts, "LOG_EVERY", "100"])
    world = World(rank=rank)
    torch.manual_seed(0)
    options["model"] = nn.Sequential(nn.Flatten(), head or nn.Linear(6, 3))
    run = engine.Run(
        make_stepper(world, accum=accum, **options),
        SimpleNamespace(train=Batches(), mixup=mixup),
        RunLog(quiet=True),
        Progress(step=start, images=4 * start),
        Window(world),
        StopRequest(),
    )
    return cfg, run


def watched(run):
    """What its steps are made of: a list for each, of (parts, last) of its batches; and norms."""
    steps, norms = [[]], []
    backward, update = run.stepper.backward, run.stepper.update

    def one(images, targets, *, parts, last):
        steps[-1].append((parts, last))
        return backward(images, targets, parts=parts, last=last)

    def step():
        steps.append([])
        norms.append(update())
        return norms[-1]

    run.stepper.backward, run.stepper.update = one, step
    return steps, norms


def norm_of(stepper, *seeds):
    """The norm of the gradient of the mean loss of some batches."""
    images, targets = map(torch.cat, zip(*map(pictures, seeds)))
    loss = stepper.criterion(stepper.model(images), targets)
    grads = torch.autograd.grad(loss, list(stepper.model.parameters()))
    return torch.cat([grad.flatten() for grad in grads]).norm().item()


def test_the_last_step_of_an_epoch_is_the_mean_of_the_batches_that_are_left():
    cfg, run = make_run(3, lr=0.0)  # so the weights stay
    _, norms = watched(run)
    assert engine.train_epoch(cfg, run)
    expected = [norm_of(run.stepper, *seeds) for seeds in ((0, 1, 2), (3, 4, 5), (6,))]
    assert [norm.item() for norm in norms] == [pytest.approx(n, rel=1e-4) for n in expected]
    assert (run.progress.step, run.progress.images) == (7, 28)


def test_steps_after_a_resume_are_counted_from_where_it_begins():
    cfg, run = make_run(3, start=2)
    steps, _ = watched(run)
    assert engine.train_epoch(cfg, run)
    whole, rest = [(3, False), (3, False), (3, True)], [(2, False), (2, True)]
    assert steps == [whole, rest, []]
    assert (run.progress.step, run.progress.images) == (7, 28)


def test_each_rank_and_each_step_draws_its_own_mixing_and_noise():
    def draws(rank):
        mixing, noise = [], []

        def mixup(images, targets):
            mixing.append(float(np.random.rand()))
            return images, targets

        class Noisy(nn.Linear):
            def forward(self, x):
                noise.append(torch.rand(1).item())
                return super().forward(x)

        cfg, run = make_run(1, rank=rank, mixup=mixup, head=Noisy(6, 3))
        assert engine.train_epoch(cfg, run)
        assert len(mixing) == len(noise) == 7
        return [mixing, noise]

    first, second = draws(0), draws(1)
    for mine, other in zip(first, second):
        assert len({*mine, *other}) == 14
    assert draws(1) == second


def test_the_average_is_that_of_its_formula():
    """It begins with the weights after the first update, whatever it was before."""
    stepper = make_stepper(ema_decay=0.75)
    average = None
    for update in range(4):
        stepper.backward(*batch(4, seed=update), parts=1, last=True)
        stepper.update()
        now = weights(stepper)
        average = [0.75 * a + 0.25 * w for a, w in zip(average, now)] if average else now
        for ours, expected in zip(stepper.ema.module.parameters(), average):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(average[0], now[0], rtol=1e-3)


@pytest.mark.parametrize(("ranks", "size", "step"), [(1, 4, 4), (2, 4, 2), (4, 2, 2), (8, 2, 1)])
def test_another_layout_goes_on_at_the_batch_of_each_rank(ranks, size, step):
    cfg = load_cfg(opts=["DATA.BATCH_SIZE", str(size)])
    progress = Progress(step=8, images=16)
    world = SimpleNamespace(size=ranks, rank=0)
    run = SimpleNamespace(world=world, progress=progress, log=RunLog(quiet=True))
    _take_ranks(cfg, run, {"layout": {"ranks": 1, "batch": 2, "accum": 1}})
    assert progress.step == step


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_so_is_the_place(tmp_path, monkeypatch):
    """Else after a power loss the new name may stand for a file that is empty, or be gone."""
    calls, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("sync", path.name, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    def replaced(self, target):
        calls.append(("replace", target.name, self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    state = {"model": {"w": torch.zeros(9)}, "ema": None, "epoch": 1, "updates": 1}
    for keep in (1, 2):
        calls.clear()
        writer.save(tmp_path / "last.pth", state, keep=keep)
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        older = [("replace", "last.1.pth", sizes["last.pth"])] if keep == 2 else []
        expected = [("sync", "last.pth", sizes["last.pth"]), *older]
        expected += [("replace", "last.pth", sizes["last.pth"]), ("sync", tmp_path.name, None)]
        weights = ("last.safetensors", sizes["last.safetensors"])
        expected += [("sync", *weights), ("replace", *weights), ("sync", tmp_path.name, None)]
        assert calls == expected
