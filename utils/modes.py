"""What the modes of main.py do: train, evaluate, measure the throughput."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from quadmamba.configs import ConfigError
from quadmamba.data import DataError, LoaderError, Loaders, build_loaders, normalise, skipped_images
from quadmamba.data.folders import shorten
from quadmamba.models import QuadMamba, build_model
from quadmamba.utils import engine, throughput
from quadmamba.utils.checkpoint import BEST, load_pretrained, plain
from quadmamba.utils.complexity import report
from quadmamba.utils.console import check_printed
from quadmamba.utils.distributed import RankError, World, choose_device, join
from quadmamba.utils.files import OutputError
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.graph_stepper import stepper_kind
from quadmamba.utils.launch import STOPPED, DeviceError, Place, stop
from quadmamba.utils.logging import RunLog
from quadmamba.utils.metrics import Metrics
from quadmamba.utils.optim import build_optimizer, build_scheduler, lr_scale, warmup_epochs
from quadmamba.utils.progress import Progress, Window
from quadmamba.utils.resume import resume, warn_of_changes
from quadmamba.utils.signals import StopRequest
from quadmamba.utils.stepper import Stepper, build_criterion
from quadmamba.utils.versions import versions
from quadmamba.utils.visualize import partition_images
from quadmamba.utils.writer import CheckpointWriter, holding

USER_ERRORS = (
    *(ConfigError, DataError, CheckpointError, DeviceError, OutputError),
    engine.DivergedError,
)


def run_mode(cfg: CfgNode, place: Place) -> int:
    """Run cfg.MODE in this process, together with the others of its run; the exit code."""
    try:
        device = choose_device(cfg.DEVICE, place)
    except DeviceError as error:  # the same on all ranks: one of a node tells it
        return stop(error if place.local_rank == 0 else None)
    try:
        with join(place, device, USER_ERRORS, timeout=60 * cfg.RANK_TIMEOUT) as world:
            return MODES[cfg.MODE](cfg, world)
    except RankError as failed:  # one rank tells the reason
        stop(failed.__cause__)
        return failed.code
    except USER_ERRORS as error:
        return stop(error)


def measure(cfg: CfgNode, world: World) -> int:
    """Print images per second and memory on random images; the last line is one JSON object."""
    log = RunLog(quiet=not world.is_main)
    greet(cfg, world, log)
    classes = cfg.MODEL.NUM_CLASSES or 1000
    torch.manual_seed(cfg.TRAIN.SEED)
    stepper = build_stepper(cfg, world, placed(build_model(cfg), world), mixed=False)
    on_gpu = world.device.type == "cuda"
    speed = throughput.measure(
        stepper,
        batch=cfg.DATA.BATCH_SIZE,
        img_size=cfg.DATA.IMG_SIZE,
        classes=classes,
        warmup=5 if on_gpu else 1,
        steps=15 if on_gpu else 3,
    )
    log.say(f"inference {speed.inference_img_s:.1f} img/s  {speed.inference_memory_gb:.2f} GB")
    log.say(f"training  {speed.training_img_s:.1f} img/s  {speed.training_memory_gb:.2f} GB")
    log.say(json.dumps({"model": cfg.MODEL.NAME, **asdict(speed)}))
    check_printed()
    return 0


def evaluate(cfg: CfgNode, world: World) -> int:
    """Print the report and the accuracy of TRAIN.PRETRAINED; the last line is one JSON object."""
    path = cfg.TRAIN.PRETRAINED or cfg.TRAIN.RESUME
    log = RunLog(quiet=not world.is_main)
    with world.together(DataError):
        share = {"rank": world.rank, "world_size": world.size, "device": world.device}
        loaders = build_loaders(cfg, **share, with_train=False)
    greet(cfg, world, log)
    _say_notes(log, loaders)
    model = build_reported(cfg, world, log, len(loaders.classes))
    source, metrics = load_and_judge(cfg, world, log, model, loaders, path)
    line = {"model": cfg.MODEL.NAME, "weights": source, **metrics.as_dict()}
    report_skipped(world, log, loaders)
    log.say(json.dumps(line))
    check_printed()
    return 0


def train(cfg: CfgNode, world: World) -> int:
    """Train: continue a run, or start one from TRAIN.PRETRAINED or fresh weights."""
    with ExitStack() as at_end:
        writer = None
        with world.together(OutputError):
            if world.is_main:
                writer = at_end.enter_context(holding(folder_of(cfg), keep=cfg.TRAIN.KEEP))
        return train_alone(cfg, world, writer)


def folder_of(cfg: CfgNode) -> Path:
    """Where a training writes."""
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def train_alone(cfg: CfgNode, world: World, writer: CheckpointWriter | None) -> int:
    """Train in a folder that no other run writes to. writer: None on ranks that do not write."""
    folder = folder_of(cfg)
    with world.together(DataError):
        share = {"rank": world.rank, "world_size": world.size, "device": world.device}
        loaders = build_loaders(cfg, **share, with_train=True)
    with world.together(ConfigError):
        check_accumulation(cfg, len(loaders.train))
    log = RunLog(folder if world.is_main else None, quiet=not world.is_main)
    log.begin(plain(cfg), loaders.classes)
    greet(cfg, world, log)
    log.say(
        f"data: {len(loaders.train.dataset)} training and {len(loaders.val.dataset)} "
        f"validation images of {len(loaders.classes)} classes in {cfg.DATA.PATH}"
    )
    _say_notes(log, loaders)
    with StopRequest() as stop:
        run = build_run(cfg, world, loaders, log, stop, writer)
        with explained(cfg, folder):
            done = engine.train(cfg, run)
    report_skipped(world, log, loaders)
    if not done:
        log.say(f"saved and ended by signal {stop.received or 'on another rank'}", "yellow")
    elif best := run.progress.best:
        log.say(
            f"done: best top-1 {best['top1']:.2f} % ({best['weights']} weights of epoch "
            f"{best['epoch']}) in {folder / BEST}",
            "green",
        )
    log.close()
    return 0 if done else STOPPED


def check_accumulation(cfg: CfgNode, batches: int) -> None:
    """Raise ConfigError where an optimizer step wants more batches than an epoch has."""
    if batches < cfg.TRAIN.ACCUM_STEPS:
        raise ConfigError(
            f"TRAIN.ACCUM_STEPS: expected at most {batches}, the batches of an epoch on each "
            f"process, got {cfg.TRAIN.ACCUM_STEPS}"
        )


@contextmanager
def explained(cfg: CfgNode, folder: Path) -> Iterator[None]:
    """Say what a user needs to know where the data goes away in the middle of a training."""
    try:
        yield
    except LoaderError:  # a disk that does not answer is not to be asked again
        raise
    except DataError as error:
        if Path(cfg.DATA.PATH).is_dir():
            raise
        raise DataError(
            f"DATA.PATH: the folder {cfg.DATA.PATH} has gone during the training: {error}\n"
            f"The last checkpoint in {folder} is kept; the same command goes on from it."
        ) from error


def build_run(
    cfg: CfgNode,
    world: World,
    loaders: Loaders,
    log: RunLog,
    stop: StopRequest,
    writer: CheckpointWriter | None,
) -> engine.Run:
    """All that takes part in a training, at the point from which it goes on."""
    model = build_reported(cfg, world, log, len(loaders.classes))
    if cfg.TRAIN.PRETRAINED:
        load_and_judge(cfg, world, log, model, loaders, cfg.TRAIN.PRETRAINED)
    updates = -(-len(loaders.train) // cfg.TRAIN.ACCUM_STEPS)
    run = engine.Run(
        build_stepper(cfg, world, model, mixed=loaders.mixup is not None, updates=updates),
        loaders,
        log,
        Progress(),
        Window(world),
        stop,
        writer=writer,
        draw=painter(cfg, world, loaders),
    )
    resume(cfg, run, folder_of(cfg), updates)
    return run


def greet(cfg: CfgNode, world: World, log: RunLog) -> None:
    """Say what runs where: versions, device, batch, rates and precision."""
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else "CPU"
    recipe, scale = cfg.TRAIN, lr_scale(cfg, world.size)
    batch = cfg.DATA.BATCH_SIZE * recipe.ACCUM_STEPS * world.size
    rule = f"{recipe.BASE_LR:g} x {batch}/{recipe.LR_BATCH}" if recipe.LR_BATCH else "not scaled"
    log.say(f"{cfg.MODEL.NAME}  {cfg.MODE}", "green")
    log.say("  ".join(f"{key} {value}" for key, value in versions().items()))
    log.say(
        f"device: {world.size} x {name}  precision: {recipe.AMP if on_gpu else 'float32'}\n"
        f"batch: {cfg.DATA.BATCH_SIZE} x {recipe.ACCUM_STEPS} steps x {world.size} processes = "
        f"{batch}  learning rate: {recipe.BASE_LR * scale:g} ({rule})"
    )
    if cfg.MODE == "train" and recipe.WARMUP_EPOCHS >= recipe.EPOCHS:
        log.warn(
            f"the warm-up takes {warmup_epochs(cfg):.3g} epochs, as TRAIN.WARMUP_EPOCHS "
            f"{recipe.WARMUP_EPOCHS} does not fit into TRAIN.EPOCHS {recipe.EPOCHS}; "
            "--opts TRAIN.WARMUP_EPOCHS N sets it"
        )


def build_reported(cfg: CfgNode, world: World, log: RunLog, classes: int) -> QuadMamba:
    """The model on the device of this rank, with fresh weights, after the report of its size."""
    torch.manual_seed(cfg.TRAIN.SEED)
    model = build_model(cfg, classes)
    if world.is_main:
        counts = report(model, cfg.DATA.IMG_SIZE)
        log.say(counts.table())
        log.record("model", 0, params=counts.params, gmacs=counts.gmacs)
    return placed(model, world)


def placed(model: QuadMamba, world: World) -> QuadMamba:
    """The model on the device of this rank, filters in the layout of the tokens: channels last."""
    return model.to(world.device, memory_format=torch.channels_last)


def build_stepper(
    cfg: CfgNode, world: World, model: QuadMamba, *, mixed: bool, updates: int = 0
) -> Stepper:
    """What takes the optimizer steps of cfg.TRAIN.

    mixed: targets come from Mixup. updates: per epoch; 0 is for timing a step as in the tables of
    other models: without schedule and average.
    """
    recipe = cfg.TRAIN
    optimizer = build_optimizer(cfg, model, world_size=world.size)
    schedule = build_scheduler(cfg, optimizer, updates, world_size=world.size) if updates else None
    return stepper_kind(recipe.COMPILE, world)(
        model,
        optimizer,
        build_criterion(mixed, recipe.LABEL_SMOOTHING),
        world=world,
        scheduler=schedule,
        amp=recipe.AMP,
        clip=recipe.CLIP_GRAD,
        ema_decay=recipe.EMA_DECAY if recipe.EMA and updates else 0.0,
        accum=recipe.ACCUM_STEPS,
        sync_bn=recipe.SYNC_BN,
        compile_mode=recipe.COMPILE,
    )


def load_and_judge(
    cfg: CfgNode, world: World, log: RunLog, model: QuadMamba, loaders: Loaders, path: str
) -> tuple[str, Metrics]:
    """Load weights and report them and their accuracy. Returns which they are, and the latter."""
    with world.together(CheckpointError):
        adapt = cfg.MODE == "train"
        loaded = load_pretrained(model, path, adapt_head=adapt, classes=loaders.classes)
    log.say(f"loaded {loaded}")
    warn_of_changes(cfg, log, loaded.config)
    metrics = engine.evaluate({"model": model}, loaders.val, world, log, amp=cfg.TRAIN.AMP)["model"]
    log.say(f"accuracy of {path}  {metrics}", "cyan")
    log.record("pretrained", 0, path=path, weights=loaded.source, **metrics.as_dict())
    return loaded.source, metrics


def painter(cfg: CfgNode, world: World, loaders: Loaders) -> Callable[[nn.Module], Tensor] | None:
    """What draws the partitions of some validation images; None where there is nothing to draw."""
    total = len(loaders.val.dataset)
    quad = {"quadtree", "release"} & set(cfg.MODEL.ORDERS)
    count = min(cfg.LOG_IMAGES, total) if quad and world.is_main else 0
    if not count:
        return None
    images = loaders.val.read([(0, i * total // count) for i in range(count)]).images
    if images is None:
        return None
    batch = normalise(images.to(world.device))
    return lambda model: partition_images(model, batch)


def _say_notes(log: RunLog, loaders: Loaders) -> None:
    for note in loaders.notes:
        log.warn(note)


def report_skipped(world: World, log: RunLog, loaders: Loaders) -> None:
    """Say how many unreadable images were left out, over all ranks."""
    for name in ("train", "val"):
        loader = getattr(loaders, name)
        parts = world.gather(sorted(skipped_images(loader)) if loader else [])
        skipped = sorted({path for part in parts for path in part})
        if skipped:
            log.warn(
                f"{len(skipped)} unreadable images of {name} were left out (DATA.ON_ERROR skip): "
                f"{shorten(skipped)}; tools/check_data.py lists them with their reasons"
            )
            log.record("skipped", 0, part=name, images=len(skipped))


MODES = {"train": train, "eval": evaluate, "throughput": measure}
