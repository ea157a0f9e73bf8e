"""Training and evaluation: the loop, and what a checkpoint keeps of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from quadmamba.utils.checkpoint import BEST, LAST, plain
from quadmamba.utils.distributed import World
from quadmamba.utils.formats import FORMAT, CheckpointError
from quadmamba.utils.hunt import first_not_finite
from quadmamba.utils.logging import RunLog, duration
from quadmamba.utils.metrics import Metrics, Tally, metrics_of
from quadmamba.utils.progress import Agreement, Progress, Window
from quadmamba.utils.rng import rng_state, seed_step
from quadmamba.utils.signals import StopRequest
from quadmamba.utils.stepper import Stepper, autocast
from quadmamba.utils.versions import versions
from quadmamba.utils.writer import CheckpointWriter

_LATE_S = 5.0  # how long training goes on while the checkpoint of the epoch before is written


class DivergedError(RuntimeError):
    """Too many steps in a row were not finite; the message names where that arises."""


class SeekableSampler(Protocol):
    """Indices of an epoch that can begin in its middle."""

    def set_epoch(self, epoch: int, seen: int) -> None:
        """Go to an epoch, after its first `seen` images."""


class Loaders(Protocol):
    """Batches (images (b, 3, h, w), targets (b)) as quadmamba.data builds them."""

    @property
    def train(self) -> DataLoader:
        """Training batches of this rank; the sampler is a SeekableSampler."""

    @property
    def val(self) -> DataLoader:
        """Validation batches of this rank."""

    @property
    def mixup(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Mixes a training batch, or None."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of their numbers."""


@dataclass
class Run:
    """What takes part in a training.

    writer: None on ranks that do not write. draw: pictures (n, 3, h, w) of a model for TensorBoard.
    stop: the signal that asks for an end. recent: (epoch, step, images, targets) of the batches of
    the last optimizer step. saved: when the last checkpoint was handed to the writer; handed: the
    same where it is that of a whole epoch, else infinity.
    """

    stepper: Stepper
    loaders: Loaders
    log: RunLog
    progress: Progress
    window: Window
    stop: StopRequest
    writer: CheckpointWriter | None = None
    draw: Callable[[nn.Module], Tensor] | None = None
    recent: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)
    saved: float = field(default_factory=time.monotonic)
    handed: float = math.inf
    agreement: Agreement = field(init=False)

    def __post_init__(self) -> None:
        self.agreement = Agreement(self.world)

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.stepper.world


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module],
    loader: DataLoader,
    world: World,
    log: RunLog,
    *,
    amp: str = "off",
    stop: StopRequest | None = None,
) -> dict[str, Metrics]:
    """Metrics of each model over the images of all ranks, in one pass.

    Leaves the models in eval mode. Returns {} where a signal to any rank asked for a stop.
    """
    tallies = {name: Tally(world.device) for name in models}
    for model in models.values():
        model.eval()
    total = len(loader)
    for step, (images, targets) in enumerate(loader):
        images, targets = _placed(images, targets, world)
        for name, model in models.items():
            with autocast(world.device, amp):
                logits = model(images)
            tallies[name].add(logits, targets)
        log.progress("validation", step + 1, total)
        if stop is not None and stop.received:
            break
    log.progress("validation", total, total)
    if stop is not None and any(world.gather(stop.received)):
        return {}
    return {name: metrics_of(world.sum(tally.totals)) for name, tally in tallies.items()}


def train(cfg: CfgNode, run: Run) -> bool:
    """Train from `run.progress` to the last epoch, validating and saving on the way.

    False where a signal asked for an end: then the state at that point is saved.
    Raises DataError of the loader, CheckpointError where a checkpoint cannot be written, and
    DivergedError.
    """
    progress = run.progress
    while progress.epoch < cfg.TRAIN.EPOCHS:
        going_on = train_epoch(cfg, run)
        names: Sequence[str] | None = validate(cfg, run) if going_on else None
        if names is None:
            save(cfg, run, [LAST])
            wait_for_writer(run)
            return False
        progress.next_epoch()
        final = progress.epoch == cfg.TRAIN.EPOCHS
        if final or progress.epoch % cfg.TRAIN.SAVE_EVERY == 0:
            names = [*names, LAST]
        save(cfg, run, names)
    wait_for_writer(run)
    return True


def train_epoch(cfg: CfgNode, run: Run) -> bool:
    """Take what is left of an epoch, in steps of TRAIN.ACCUM_STEPS batches (fewer in the last).

    False where a signal asked for an end; the step under way is finished.
    """
    stepper, progress, accum = run.stepper, run.progress, cfg.TRAIN.ACCUM_STEPS
    stepper.net.train()
    batches, total = _batches(cfg, run)
    start = progress.step
    for images, targets in batches:
        first = start + (progress.step - start) // accum * accum
        last = progress.step + 1 == min(first + accum, total)
        parts = min(accum, total - first)
        if progress.step == first:
            run.recent.clear()
        run.recent.append((progress.epoch, progress.step, images, targets))
        loss = stepper.backward(images, targets, parts=parts, last=last)
        run.window.add(loss, len(images))
        progress.step += 1
        progress.images += cfg.DATA.BATCH_SIZE * run.world.size
        run.log.progress(f"epoch {progress.epoch + 1}", progress.step, total)
        if last and _update(cfg, run, total):
            return False
    return True


def _update(cfg: CfgNode, run: Run, total: int) -> bool:
    """Take the optimizer step, and log, save and stop where that is due; True to stop."""
    stepper, limit = run.stepper, cfg.TRAIN.MAX_BAD_STEPS
    run.window.norm = stepper.update()
    if run.writer is not None and time.monotonic() - run.handed > _LATE_S:
        run.writer.finish()
    if stepper.updates % cfg.LOG_EVERY == 0:
        _report_steps(cfg, run, total)  # waits for the device
    wishes = bool(run.stop.received), _is_due(cfg, run)
    stop, due, bad = run.agreement.ask(*wishes, stepper.bad_in_row)
    if bad >= limit - 1 and int(stepper.bad_in_row) >= limit:  # waits for the device
        _name_the_fault(cfg, run)
    if due and not stop:
        save(cfg, run, [LAST])
    return stop


def _is_due(cfg: CfgNode, run: Run) -> bool:
    """Whether rank 0 wants to save between epochs, or has to tell that it could not."""
    if run.writer is None:
        return False
    late = 0 < 60 * cfg.TRAIN.SAVE_MINUTES <= time.monotonic() - run.saved
    return run.writer.failed or (late and not run.writer.busy)


def _batches(cfg: CfgNode, run: Run) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """Mixed batches on the device from the progress of the run on, each after seeding its step.

    Also returns the number of batches of the epoch, those before included.
    """
    progress, loader, world = run.progress, run.loaders.train, run.world
    cast(SeekableSampler, loader.sampler).set_epoch(progress.epoch, progress.images)
    total = progress.step + len(loader)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        source = iter(loader)
        for step in range(progress.step, total):
            seed_step(cfg.TRAIN.SEED, progress.epoch, step, world.rank)
            images, targets = _placed(*next(source), world)
            if run.loaders.mixup is not None:
                images, targets = run.loaders.mixup(images, targets)
            yield images, targets

    return batches(), total


def _placed(images: Tensor, targets: Tensor, world: World) -> tuple[Tensor, Tensor]:
    return (
        images.to(world.device, non_blocking=True, memory_format=torch.channels_last),
        targets.to(world.device, non_blocking=True),
    )


def _report_steps(cfg: CfgNode, run: Run, total: int) -> None:
    """Say and record the means since the last log line."""
    stepper, epoch, step = run.stepper, run.progress.epoch, run.progress.step
    values = run.window.read()
    left = values.pop("seconds_per_step") * ((cfg.TRAIN.EPOCHS - epoch) * total - step)
    values = {"epoch": epoch + 1, "lr": stepper.optimizer.param_groups[0]["lr"], **values}
    values["skipped"] = int(stepper.skipped)
    if run.world.device.type == "cuda":
        values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    run.log.record("train", stepper.updates, **values)
    run.log.say(
        f"epoch {epoch + 1}/{cfg.TRAIN.EPOCHS}  step {step}/{total}  "
        f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  "
        f"{values['images_per_s']:.0f} img/s"
        + (f"  {values['memory_gb']:.1f} GB" if "memory_gb" in values else "")
        + (f"  skipped {values['skipped']}" if values["skipped"] else "")
        + f"  eta {duration(left)}",
        None if math.isfinite(values["loss"]) else "red",
    )


def _name_the_fault(cfg: CfgNode, run: Run) -> None:
    """Run the batches of the last step again on each rank and say where the fault arises.

    Raises RankError, whose cause is DivergedError on the rank to tell it.
    """
    found = ""
    for epoch, step, images, targets in run.recent:
        seed_step(cfg.TRAIN.SEED, epoch, step, run.world.rank)
        replay = partial(run.stepper.replay, images, targets)
        found = found or first_not_finite(run.stepper.model, replay)
    names = run.world.gather(found)
    ranks = [rank for rank, name in enumerate(names) if name]
    place = f"rank {ranks[0]}: {names[ranks[0]]}" if ranks else "it did not come again in a replay"
    with run.world.together(DivergedError):
        raise DivergedError(
            f"{cfg.TRAIN.MAX_BAD_STEPS} steps in a row were not finite (TRAIN.MAX_BAD_STEPS), the "
            f"last one is step {run.stepper.updates}; first not finite on {place}. "
            "The weights are those before these steps; a lower TRAIN.BASE_LR or TRAIN.AMP bf16 "
            "may help"
        )


def validate(cfg: CfgNode, run: Run) -> list[str] | None:
    """Validate where that is due; the files to write for it, None where a signal came."""
    progress, stepper, log = run.progress, run.stepper, run.log
    epoch = progress.epoch + 1
    final = epoch == cfg.TRAIN.EPOCHS
    if not final and epoch % cfg.TRAIN.EVAL_EVERY:
        return []
    models = {"model": stepper.model} | ({"ema": stepper.ema.module} if stepper.ema else {})
    metrics = evaluate(models, run.loaders.val, run.world, log, amp=stepper.amp, stop=run.stop)
    if not metrics:
        return None
    best = progress.judge(metrics)
    flat = {f"{n}_{key}": v for n, result in metrics.items() for key, v in asdict(result).items()}
    log.record("val", stepper.updates, epoch=epoch, **flat)
    for name, result in metrics.items():
        log.say(f"epoch {epoch}  validation of {name:<5}  {result}", "cyan")
    if run.draw is not None and (final or epoch % cfg.LOG_IMAGES_EVERY == 0):
        log.images("partition", run.draw(stepper.model), stepper.updates)
    return [BEST] if best else []


def save(cfg: CfgNode, run: Run, names: Sequence[str]) -> None:
    """Hand the state of all ranks to the writer of rank 0, under each of `names` in turn."""
    if not names:
        return
    run.log.sync()
    part = {"rng": rng_state(run.world.device), "window": run.window.state()}
    ranks = run.world.gather(part)
    with run.world.together(CheckpointError):
        if run.writer is not None:
            run.writer.submit(checkpoint_of(cfg, run, ranks), names)
    if LAST in names:
        run.saved = time.monotonic()
        run.handed = math.inf if run.progress.step else run.saved
        run.agreement.saved()


def wait_for_writer(run: Run) -> None:
    """Wait until the checkpoints are on the disk."""
    with run.world.together(CheckpointError):
        if run.writer is not None:
            run.writer.wait()


def data_of(run: Run) -> dict[str, int]:
    """How many images a run trains on and validates with."""
    loaders = run.loaders
    return {"training": len(loaders.train.dataset), "validation": len(loaders.val.dataset)}


def checkpoint_of(cfg: CfgNode, run: Run, ranks: Sequence[Mapping]) -> dict[str, object]:
    """The dict of a checkpoint (keys: utils.checkpoint)."""
    layout = (run.world.size, cfg.DATA.BATCH_SIZE, cfg.TRAIN.ACCUM_STEPS)
    return {
        "format": FORMAT,
        **run.stepper.state(),
        **asdict(run.progress),
        "ranks": list(ranks),
        "layout": dict(zip(("ranks", "batch", "accum"), layout)),
        "classes": list(run.loaders.classes),
        "data": data_of(run),
        "config": plain(cfg),
        "versions": versions(),
    }
