"""Continue a run from its checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from yacs.config import CfgNode

from quadmamba.utils.checkpoint import BEST, newest_run, plain, read_run
from quadmamba.utils.classes import check_same, names_in
from quadmamba.utils.engine import Run, data_of
from quadmamba.utils.files import OutputError
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.logging import RunLog
from quadmamba.utils.rng import set_rng_state
from quadmamba.utils.writer import copy_with_weights

# Keys of the model that change what it computes but not the shapes of its weights
SILENT_KEYS = ("ORDERS", "WINDOW", "PARTITION", "SHIFT", "SHIFT_DIRECTIONS")
# Keys that change neither the weights nor which of them are the best
WITHOUT_INFLUENCE = (
    *("MODE", "OUTPUT", "TAG", "RANK_TIMEOUT", "LOG_EVERY", "LOG_IMAGES", "LOG_IMAGES_EVERY"),
    *("MODEL.NAME", "MODEL.USE_CHECKPOINT", "DATA.WORKERS", "DATA.TIMEOUT", "DATA.PIN_MEMORY"),
    *("TRAIN.SAVE_EVERY", "TRAIN.SAVE_MINUTES", "TRAIN.KEEP", "TRAIN.AUTO_RESUME"),
    *("TRAIN.RESUME", "TRAIN.PRETRAINED", "TRAIN.MAX_BAD_STEPS"),
)


def resume(cfg: CfgNode, run: Run, folder: Path, updates: int) -> None:
    """Continue from TRAIN.RESUME, else with AUTO_RESUME from the newest whole file in `folder`.

    updates: optimizer steps of an epoch now; with another batch size than before the schedule goes
    on at the same point of the epoch. Where there is no checkpoint, a log begins anew; where all
    epochs are done, the log stays as it is.
    """
    path = cfg.TRAIN.RESUME
    if not path or _began_before(cfg, run, folder):
        path = _newest(run, folder) if path or cfg.TRAIN.AUTO_RESUME else ""
    if not path:
        with run.world.together(OutputError):
            run.log.start_over()
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
    if _is_done(cfg, run, path):
        return
    place = f"after epoch {progress.epoch} of {cfg.TRAIN.EPOCHS}"
    if progress.step:
        place += f" and {progress.images} images of the next"
    run.log.say(f"continuing {path} {place}", "green")
    progress.best = _best_in(run, folder, path)
    changed = _tell_changes(cfg, run, payload)
    with run.world.together(OutputError):
        run.log.go_back(payload["updates"], progress.epoch)
        about = {"epoch": progress.epoch, "changed": changed}
        run.log.record("resume", payload["updates"], path=path, **about)
    if not saved:
        run.log.warn(f"{path} names no classes: they are taken for those of the data")
    _take_ranks(cfg, run, payload)
    _follow_schedule(run, path, updates)
    if cfg.TRAIN.PRETRAINED:
        run.log.warn(
            f"the weights of TRAIN.PRETRAINED are replaced by those of {path}; "
            "to start anew choose another --tag"
        )


def _is_done(cfg: CfgNode, run: Run, path: str) -> bool:
    """Whether there is no epoch left to train; says so, and leaves the log as it was."""
    done, wanted = run.progress.epoch, cfg.TRAIN.EPOCHS
    if done < wanted:
        return False
    if done == wanted:
        run.log.say(f"continuing {path} after epoch {done} of {wanted}", "green")
    run.log.say(
        f"nothing to do: {done} epochs are done in {path}, and TRAIN.EPOCHS is {wanted} "
        "(more of them with --epochs go on from there)",
        "yellow",
    )
    with run.world.together(OutputError):
        run.log.withdraw()
    return True


def _tell_changes(cfg: CfgNode, run: Run, payload: Mapping) -> dict[str, list]:
    """Warn of what differs from when the checkpoint was saved; returns [then, now] by key."""
    changed = changes({**payload["config"], **_data(payload)}, {**plain(cfg), **_data(run)})
    if changed:
        lines = [f"  {key}: {then} -> {now}" for key, (then, now) in changed.items()]
        run.log.warn("\n".join(["the run goes on with other settings than it had:", *lines]))
    moved = {"TRAIN.SEED", "training images"} & set(changed)
    if moved and run.progress.step:
        run.log.warn(
            f"{' and '.join(sorted(moved))}: the order of the images is another one, so in the "
            "epoch under way some may come twice and others not at all"
        )
    return changed


def _data(source: Run | Mapping) -> dict[str, int]:
    """How many images there are, of a run or of a checkpoint, in the words of a warning."""
    counts = data_of(source) if isinstance(source, Run) else source.get("data", {})
    return {f"{name} images": count for name, count in counts.items()}


def changes(then: Mapping, now: Mapping) -> dict[str, list]:
    """Values [then, now] by dotted key, of those in both that differ and influence the result."""
    before, after = _flat(then), _flat(now)
    keys = [key for key in after if key in before and key not in WITHOUT_INFLUENCE]
    return {key: [before[key], after[key]] for key in keys if before[key] != after[key]}


def _flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _best_in(run: Run, folder: Path, path: str) -> dict[str, object]:
    """The best validation so far: the one that best.pth holds, also where that is newer than the
    checkpoint at `path`. Of a run in another folder it is brought along.
    """
    saved, best, why = run.progress.best, {}, ""
    source = Path(path).parent / BEST
    with run.world.together(CheckpointError):
        if run.world.is_main and (saved or source.exists()):
            try:
                best = read_run(source)["best"]
            except CheckpointError as error:
                why = f"{error}"
            if not _same_folder(source.parent, folder):
                best = best if best == saved else {}
                if best:
                    copy_with_weights(source, folder / BEST)
    best, why = run.world.gather((best, why))[0]
    if saved and not best:
        run.log.warn(
            f"best.pth of epoch {saved['epoch']} ({saved['top1']:.2f} %) is not there"
            f"{f' ({why})' if why else ''}: the next validation counts as the best"
        )
    return best


def _same_folder(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


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
