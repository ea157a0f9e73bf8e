"""Training and evaluation: the loop, and what a checkpoint keeps of it.

Every random number of a training step comes from (seed, epoch, step, rank), so that a run that is
continued draws the same ones without any generator in its checkpoint.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from yacs.config import CfgNode

from quadmamba.utils.checkpoint import (
    BEST,
    FORMAT,
    LAST,
    CheckpointError,
    plain,
    save,
)
from quadmamba.utils.distributed import World
from quadmamba.utils.logging import RunLog, duration
from quadmamba.utils.metrics import Metrics, Tally, metrics_of
from quadmamba.utils.stepper import Stepper, autocast


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPU) for one training step of one rank."""
    words = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


@dataclass
class Progress:
    """How far a run is.

    epoch: epochs completed. metrics, best: of the last and the best validation, with the keys of
    utils.checkpoint.
    """

    epoch: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    best: dict[str, object] = field(default_factory=dict)

    def judge(self, metrics: Mapping[str, Metrics]) -> bool:
        """Take a validation; True where its top-1 is the best so far. A tie goes to the average."""
        self.metrics = {name: result.as_dict() for name, result in metrics.items()}
        name = max(metrics, key=lambda key: (metrics[key].top1, key == "ema"))
        better = not self.best or metrics[name].top1 > self.best["top1"]
        if better:
            self.best = {"top1": metrics[name].top1, "epoch": self.epoch, "weights": name}
        return better


class Loaders(Protocol):
    """Batches (images (b, 3, h, w), targets (b)) as quadmamba.data builds them."""

    @property
    def train(self) -> DataLoader:
        """Training batches of this rank; the sampler has set_epoch."""

    @property
    def val(self) -> DataLoader:
        """Validation batches of this rank."""

    @property
    def mixup(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Mixes a training batch, or None."""


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module],
    loader: DataLoader,
    world: World,
    log: RunLog,
    *,
    amp: str = "off",
) -> dict[str, Metrics]:
    """Metrics of each model over the images of all ranks, in one pass.

    Leaves the models in eval mode.
    """
    tallies = {name: Tally(world.device) for name in models}
    for model in models.values():
        model.eval()
    total = len(loader)
    for step, (images, targets) in enumerate(loader):
        images = images.to(world.device, non_blocking=True)
        targets = targets.to(world.device, non_blocking=True)
        for name, model in models.items():
            with autocast(world.device, amp):
                logits = model(images)
            tallies[name].add(logits, targets)
        log.progress("validation", step + 1, total)
    log.progress("validation", total, total)
    return {name: metrics_of(world.sum(tally.totals)) for name, tally in tallies.items()}


def train(
    cfg: CfgNode,
    stepper: Stepper,
    loaders: Loaders,
    log: RunLog,
    *,
    folder: Path,
    progress: Progress,
    draw: Callable[[nn.Module], Tensor] | None,
) -> Progress:
    """Train from `progress` to the last epoch, validating and saving on the way.

    loaders: train, val and mixup as from quadmamba.data.
    draw: pictures (n, 3, h, w) of a model for TensorBoard, None for none.
    Raises DataError of the loader, and CheckpointError where a checkpoint cannot be written.
    """
    train_cfg, world = cfg.TRAIN, stepper.world
    while progress.epoch < train_cfg.EPOCHS:
        train_epoch(cfg, stepper, loaders, log, progress.epoch)
        progress.epoch += 1
        final, best = progress.epoch == train_cfg.EPOCHS, False
        if final or progress.epoch % train_cfg.EVAL_EVERY == 0:
            models = {"model": stepper.model}
            models |= {"ema": stepper.ema.module} if stepper.ema else {}
            metrics = evaluate(models, loaders.val, world, log, amp=stepper.amp)
            best = progress.judge(metrics)
            _report_validation(metrics, stepper, progress, log)
            if draw is not None and (final or progress.epoch % cfg.LOG_IMAGES_EVERY == 0):
                log.images("partition", draw(stepper.model), stepper.updates)
        due = final or progress.epoch % train_cfg.SAVE_EVERY == 0
        names = [name for name, wanted in ((BEST, best), (LAST, due)) if wanted]
        with world.together(CheckpointError):
            if world.is_main and names:
                payload = checkpoint_of(cfg, stepper, progress)
                for name in names:
                    save(folder / name, payload)
    return progress


def train_epoch(cfg: CfgNode, stepper: Stepper, loaders: Loaders, log: RunLog, epoch: int) -> None:
    """One pass over the training set, in steps of TRAIN.ACCUM_STEPS batches (fewer in the last)."""
    steps, accum = len(loaders.train), cfg.TRAIN.ACCUM_STEPS
    window = _Window(stepper.world)
    stepper.net.train()
    batches = _batches(loaders.train, cfg.TRAIN.SEED, epoch, stepper.world)
    for step, (images, targets) in enumerate(batches):
        if loaders.mixup is not None:
            images, targets = loaders.mixup(images, targets)
        first = step - step % accum
        last = step + 1 == min(first + accum, steps)
        loss = stepper.backward(images, targets, parts=min(accum, steps - first), last=last)
        window.add(loss, len(images))
        if last:
            window.norm = stepper.update()
        log.progress(f"epoch {epoch + 1}", step + 1, steps)
        if last and stepper.updates % cfg.LOG_EVERY == 0:
            window.report(cfg, stepper, log, epoch, (step + 1, steps))  # waits for the device


def _batches(
    loader: DataLoader, seed: int, epoch: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of an epoch on the device, each after seeding its step."""
    cast(DistributedSampler, loader.sampler).set_epoch(epoch)
    batches = iter(loader)
    for step in range(len(loader)):
        seed_step(seed, epoch, step, world.rank)
        images, targets = next(batches)
        yield (
            images.to(world.device, non_blocking=True),
            targets.to(world.device, non_blocking=True),
        )


class _Window:
    """Sums between two log lines, on the device until `report` reads them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.norm = torch.zeros((), device=world.device)
        self._start()

    def _start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self.batches, self.clock = 0, time.perf_counter()

    def add(self, loss: Tensor, images: int) -> None:
        self.sums[0] += loss
        self.sums[1] += images
        self.batches += 1

    def report(
        self, cfg: CfgNode, stepper: Stepper, log: RunLog, epoch: int, at: tuple[int, int]
    ) -> None:
        """Say and record the means over the window and all ranks."""
        loss, images = self.world.sum(self.sums).tolist()
        seconds = time.perf_counter() - self.clock
        left = (cfg.TRAIN.EPOCHS - epoch) * at[1] - at[0]
        values = {
            "epoch": epoch + 1,
            "loss": loss / self.batches / self.world.size,
            "lr": stepper.optimizer.param_groups[0]["lr"],
            "grad_norm": float(self.norm),
            "images_per_s": images / seconds,
            "skipped": int(stepper.skipped),
        }
        if self.world.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        log.record("train", stepper.updates, **values)
        log.say(
            f"epoch {epoch + 1}/{cfg.TRAIN.EPOCHS}  step {at[0]}/{at[1]}  "
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  "
            f"{values['images_per_s']:.0f} img/s"
            + (f"  {values['memory_gb']:.1f} GB" if "memory_gb" in values else "")
            + (f"  skipped {values['skipped']}" if values["skipped"] else "")
            + f"  eta {duration(seconds / self.batches * left)}",
            None if math.isfinite(values["loss"]) else "red",
        )
        self._start()


def _report_validation(
    metrics: Mapping[str, Metrics], stepper: Stepper, progress: Progress, log: RunLog
) -> None:
    flat = {f"{n}_{key}": v for n, result in metrics.items() for key, v in result.as_dict().items()}
    log.record("val", stepper.updates, epoch=progress.epoch, **flat)
    for name, result in metrics.items():
        log.say(f"epoch {progress.epoch}  validation of {name:<5}  {result}", "cyan")


def checkpoint_of(cfg: CfgNode, stepper: Stepper, progress: Progress) -> dict[str, object]:
    """The dict of a checkpoint (keys: utils.checkpoint)."""
    return {
        "format": FORMAT,
        **stepper.state(),
        "epoch": progress.epoch,
        "metrics": progress.metrics,
        "best": progress.best,
        "config": plain(cfg),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "timm": str(timm.__version__),
    }
