"""Continue a run from its checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from yacs.config import CfgNode

from quadmamba.utils.checkpoint import newest_run, plain, read_run
from quadmamba.utils.classes import check_same, names_in
from quadmamba.utils.engine import Run
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.logging import RunLog
from quadmamba.utils.rng import set_rng_state

# Keys of the model that change what it computes but not the shapes of its weights
SILENT_KEYS = ("ORDERS", "WINDOW", "PARTITION", "SHIFT", "SHIFT_DIRECTIONS")


def resume(cfg: CfgNode, run: Run, folder: Path, updates: int) -> None:
    """Continue from TRAIN.RESUME, else with AUTO_RESUME from the newest whole file in `folder`.

    updates: optimizer steps of an epoch now; with another batch size than before the schedule goes
    on at the same point of the epoch. Does nothing where there is no checkpoint.
    """
    path = cfg.TRAIN.RESUME
    if not path or _began_before(cfg, run, folder):
        path = _newest(run, folder) if path or cfg.TRAIN.AUTO_RESUME else ""
    if not path:
        return
    where = path if path == cfg.TRAIN.RESUME else f"{path} (another --tag starts anew)"
    with run.world.together(CheckpointError):
        payload = read_run(path)
        saved = names_in(payload, path)
        check_same(saved, run.loaders.classes, path)
        run.stepper.load_state(payload, where)
    progress = run.progress
    for key in ("epoch", "step", "images", "metrics", "best"):
        setattr(progress, key, payload[key])
    place = f"after epoch {progress.epoch} of {cfg.TRAIN.EPOCHS}"
    if progress.step:
        place += f" and {progress.images} images of the next"
    run.log.say(f"continuing {path} {place}", "green")
    run.log.record("resume", run.stepper.updates, path=path, epoch=progress.epoch)
    if not saved:
        run.log.warn(f"{path} names no classes: they are taken for those of the data")
    warn_of_changes(cfg, run.log, payload["config"])
    _take_ranks(cfg, run, payload)
    _follow_schedule(run, path, updates)
    if cfg.TRAIN.PRETRAINED:
        run.log.warn(
            f"the weights of TRAIN.PRETRAINED are replaced by those of {path}; "
            "to start anew choose another --tag"
        )


def _began_before(cfg: CfgNode, run: Run, folder: Path) -> bool:
    """Whether the run in `folder` began with TRAIN.RESUME: then this is a restart of it."""
    began = False
    if run.world.is_main:
        with contextlib.suppress(CheckpointError):
            found = newest_run(folder)
            config = read_run(found[0])["config"] if found else {"TRAIN": {}}
            began = config["TRAIN"].get("RESUME") == cfg.TRAIN.RESUME
    return run.world.gather(began)[0]


def _newest(run: Run, folder: Path) -> str:
    """The file to continue from, as rank 0 finds it; "" for none."""
    path, refused = "", []
    with run.world.together(CheckpointError):
        if run.world.is_main and (found := newest_run(folder)):
            path, refused = str(found[0]), found[1]
    for reason in refused:
        run.log.warn(f"{reason}\n  {path} is used instead")
    return run.world.gather(path)[0]


def _take_ranks(cfg: CfgNode, run: Run, payload: Mapping) -> None:
    """Take what the checkpoint keeps of this rank, or say what is lost with another layout."""
    then = payload["layout"]
    now = (run.world.size, cfg.DATA.BATCH_SIZE, cfg.TRAIN.ACCUM_STEPS)
    if tuple(then.values()) == now:
        part = payload["ranks"][run.world.rank]
        set_rng_state(part["rng"], run.world.device)
        run.window.load_state(part["window"])
        return
    run.log.warn(
        f"saved with {then['ranks']} ranks x batch {then['batch']} x {then['accum']} steps, now "
        f"{now[0]} x {now[1]} x {now[2]}: each image of an epoch still comes once, but mixing and "
        "noise draw other numbers, so the result is not bit-equal to that of an unbroken run"
    )
    run.progress.step = run.progress.images // (now[0] * now[1])


def _follow_schedule(run: Run, path: str, updates: int) -> None:
    """Go to the step of the schedule that belongs to this point of the epoch."""
    progress, stepper = run.progress, run.stepper
    run.loaders.train.sampler.set_epoch(progress.epoch, progress.images)
    rest, whole = len(run.loaders.train), progress.step + len(run.loaders.train)
    done = round(updates * progress.step / whole) if rest else updates
    due = progress.epoch * updates + (done if progress.step else 0)
    if abs(stepper.updates - due) > 1:
        run.log.warn(
            f"{path} took {stepper.updates} steps, with this batch size and data it would be "
            f"{due}; the learning rate follows the epoch"
        )
        stepper.move_to(due)


def warn_of_changes(cfg: CfgNode, log: RunLog, saved: Mapping) -> None:
    """Warn where the weights were trained for another scan than the one they now get."""
    now, then = plain(cfg.MODEL), saved.get("MODEL")
    for key in SILENT_KEYS:
        if isinstance(then, Mapping) and key in then and then[key] != now[key]:
            log.warn(f"MODEL.{key}: the weights were trained with {then[key]}, now {now[key]}")
