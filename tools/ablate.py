"""Train the rows of a table on cluttered digits with several seeds, and write what came out.

    python tools/make_digits.py datasets/c4 --cluttered --train 24000 --val 1440 --strokes 4
    python tools/ablate.py order --data datasets/c4 --output output/ablation --jobs 15

Tables: order, windows (the paper's Table 4), partition (5), layers (Fig. 5), depths (6), selection
and shift. OUTPUT/TABLE receives runs.csv, table.md, plot.png and runs.json, and a folder for each
run. What is finished there is kept, what was cut off goes on. --jobs N makes N runs at a time, each
in a process of its own; process i takes GPU i modulo their number. Wrong input ends with exit code
2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from quadmamba.configs import ConfigError, Parser, load_cfg, path_argument
from quadmamba.data import DataError
from quadmamba.data.canvases import Canvases, CanvasLoader, read_canvases
from quadmamba.models import build_model
from quadmamba.utils import ablation, engine
from quadmamba.utils.checkpoint import plain
from quadmamba.utils.complexity import report
from quadmamba.utils.console import lasting_console
from quadmamba.utils.distributed import RankError, World, choose_device
from quadmamba.utils.files import OutputError
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.launch import DeviceError
from quadmamba.utils.logging import RunLog
from quadmamba.utils.modes import build_stepper, placed
from quadmamba.utils.progress import Progress, Window
from quadmamba.utils.resume import resume
from quadmamba.utils.signals import StopRequest
from quadmamba.utils.versions import versions
from quadmamba.utils.views import centre_rates
from quadmamba.utils.writer import CheckpointWriter, holding, save_file

CLASSES = 10
USER_ERRORS = (
    ConfigError,
    DataError,
    DeviceError,
    OutputError,
    CheckpointError,
    engine.DivergedError,
)
_QUAD, _RASTER = ["quadtree"] * 2 + ["raster"] * 2, ["raster"] * 4
_RELEASE, _STAGE_1 = ["release"] * 2 + ["raster"] * 2, ["window"] + ["raster"] * 3

# Table, row, the keys of MODEL that make the row
TABLES: dict[str, dict[str, dict[str, object]]] = {
    "order": {
        "raster": {"ORDERS": _RASTER},
        "window 7x7": {"ORDERS": ["window"] * 2 + ["raster"] * 2, "WINDOW": 7},
        "quadtree": {"ORDERS": _QUAD},
        "release": {"ORDERS": _RELEASE},
        "random quadrant": {"ORDERS": _QUAD, "SELECTION": "random"},
    },
    "windows": {  # stage 1 has 28x28 tokens here, 56x56 in the paper
        "none": {"ORDERS": _RASTER},
        "half a side": {"ORDERS": _STAGE_1, "WINDOW": 14},
        "a quarter": {"ORDERS": _STAGE_1, "WINDOW": 7},
        "2x2 tokens": {"ORDERS": _STAGE_1, "WINDOW": 2},
    },
    "partition": {
        "release 1, 2": {"ORDERS": _RELEASE, "PARTITION": [1, 2]},
        "release 2, 4": {"ORDERS": _RELEASE, "PARTITION": [2, 4]},
        "release 4, 8": {"ORDERS": _RELEASE, "PARTITION": [4, 8]},
        "quadtree 2, 2": {"ORDERS": _QUAD, "PARTITION": [2, 2]},
        "quadtree 2, 4": {"ORDERS": _QUAD, "PARTITION": [2, 4]},
        "quadtree 4, 8": {"ORDERS": _QUAD, "PARTITION": [4, 8]},
    },
    "layers": {
        "stages 1-3": {"ORDERS": ["quadtree"] * 3 + ["raster"]},
        "stage 1": {"ORDERS": ["quadtree"] + ["raster"] * 3},
        "stages 1-2, one direction": {"ORDERS": _QUAD, "SHIFT_DIRECTIONS": 1},
        "stages 1-2, four directions": {"ORDERS": _QUAD, "SHIFT_DIRECTIONS": 4},
    },
    "depths": {
        "2-2-8-2": {"DEPTHS": [2, 2, 8, 2]},
        "2-8-2-2": {"DEPTHS": [2, 8, 2, 2]},
        "2-2-2-8": {"DEPTHS": [2, 2, 2, 8]},
        "2-4-6-2": {"DEPTHS": [2, 4, 6, 2]},
    },
    "selection": {
        "predictor": {"SELECTION": "predictor"},
        "predictor, no noise": {"GUMBEL": False},
        "predictor, tau 0.5": {"TAU": 0.5},
        "predictor, tau 5": {"TAU": 5.0},
        "random": {"SELECTION": "random"},
        "first": {"SELECTION": "first"},
    },
    "shift": {
        "none": {"SHIFT": False},
        "one direction": {"SHIFT_DIRECTIONS": 1},
        "four directions": {"SHIFT_DIRECTIONS": 4},
    },
}


@dataclass(frozen=True)
class Job:
    """One run: row, seed, configuration file, KEY VALUE words, and its folder."""

    row: str
    seed: int
    path: str
    opts: tuple[str, ...]
    folder: Path

    def load(self) -> CfgNode:
        """Its configuration. Raises ConfigError."""
        return load_cfg(self.path, {"TRAIN.SEED": self.seed}, self.opts)


def plan(args: argparse.Namespace) -> list[Job]:
    """The runs of a table, seed after seed, so that an early end leaves whole rounds."""
    data, output = (str(path).replace("$", "$$") for path in (args.data, args.output))
    common = ["DATA.PATH", data, "OUTPUT", output, *args.opts]
    if args.epochs is not None:
        common += ["TRAIN.EPOCHS", str(args.epochs)]
    jobs = []
    for seed in range(args.seeds):
        for row in args.rows or TABLES[args.table]:
            keys = TABLES[args.table][row]
            words = [w for key, value in keys.items() for w in (f"MODEL.{key}", json.dumps(value))]
            name = f"{row.replace(' ', '_').replace(',', '')}-{seed}"
            folder = args.output / args.table / name
            jobs.append(Job(row, seed, str(args.cfg), (*common, *words), folder))
    return jobs


def settings(cfg: CfgNode) -> dict[str, object]:
    """What a finished run must share with a planned one to be taken for it."""
    tree = plain(cfg)
    return {key: tree[key] for key in ("MODEL", "TRAIN", "DATA")}


def finished(job: Job) -> ablation.Result | None:
    """The result in the folder of `job`, None where there is none yet.

    Raises ConfigError where the run had other settings or its result cannot be read.
    """
    path = job.folder / "result.json"
    if not path.is_file():
        return None
    try:
        result = ablation.Result(**json.loads(path.read_text()))
        made_with = result.made_with["config"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it, the run is made again"
        ) from error
    if made_with != settings(job.load()):
        raise ConfigError(
            f"{path} was made with other settings; choose another --output or remove {job.folder}"
        )
    return result


@dataclass(frozen=True)
class DigitLoaders:
    """Batches of both parts in the memory of the device, as the engine takes them."""

    train: CanvasLoader
    val: CanvasLoader
    mixup: None = None
    classes: tuple[str, ...] = tuple(map(str, range(CLASSES)))


def build_loaders(cfg: CfgNode, device: torch.device) -> DigitLoaders:
    """Loaders of cfg.DATA.PATH. Raises DataError."""
    train, val = (read_canvases(Path(cfg.DATA.PATH), part).to(device) for part in ("train", "val"))
    _check(cfg, train)
    return DigitLoaders(
        CanvasLoader(train, cfg.DATA.BATCH_SIZE, shuffle=True, seed=cfg.TRAIN.SEED),
        CanvasLoader(val, cfg.DATA.BATCH_SIZE, shuffle=False),
    )


def _check(cfg: CfgNode, train: Canvases) -> None:
    if train.images.shape[-1] != cfg.DATA.IMG_SIZE:
        raise DataError(
            f"{cfg.DATA.PATH}: expected canvases of DATA.IMG_SIZE {cfg.DATA.IMG_SIZE} pixels, "
            f"got {train.images.shape[-1]}"
        )
    if len(train.targets) < cfg.DATA.BATCH_SIZE:
        raise DataError(
            f"DATA.BATCH_SIZE: expected at most {len(train.targets)}, the canvases in "
            f"{cfg.DATA.PATH}/train, got {cfg.DATA.BATCH_SIZE}"
        )


def centred(loader: CanvasLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Validation images and the centres of their digits."""
    centres = loader.canvases.centres.split(loader.batch)
    return ((images, part) for (images, _), part in zip(loader, centres))


def run(job: Job) -> ablation.Result:
    """Train one row with one seed; goes on where the run was cut off.

    Raises OutputError where another process writes to its folder.
    """
    with holding(job.folder, keep=1) as writer:
        return _train(job, writer)


def _train(job: Job, writer: CheckpointWriter) -> ablation.Result:
    cfg = job.load()
    started = time.perf_counter()
    number = torch.cuda.current_device() if torch.cuda.is_available() else 0
    world = World(device=choose_device(cfg.DEVICE, World(local_rank=number)))
    loaders = build_loaders(cfg, world.device)
    torch.manual_seed(cfg.TRAIN.SEED)
    model = placed(build_model(cfg, CLASSES), world)
    size = report(model, cfg.DATA.IMG_SIZE)
    fresh = centre_rates(model, centred(loaders.val))
    updates = -(-len(loaders.train) // cfg.TRAIN.ACCUM_STEPS)
    stepper = build_stepper(cfg, world, model, mixed=False, updates=updates)
    log = RunLog(job.folder, quiet=True)
    log.begin(plain(cfg), loaders.classes)
    progress = Progress()
    parts = (stepper, loaders, log, progress, Window(world), StopRequest())
    training = engine.Run(*parts, writer=writer)
    try:
        resume(cfg, training, job.folder, updates)
        engine.train(cfg, training)
    except RankError as failed:  # of one rank the cause is always here
        raise failed.__cause__ or failed from None
    log.close()
    result = ablation.Result(
        job.row,
        job.seed,
        top1=progress.metrics["model"]["top1"],
        loss=progress.metrics["model"]["loss"],
        params=size.params,
        gmacs=size.gmacs,
        seconds=time.perf_counter() - started,
        rates=centre_rates(model, centred(loaders.val)),
        fresh=fresh,
        made_with={"config": settings(cfg), **_machine(world.device)},
    )
    _write(job.folder / "result.json", json.dumps(asdict(result), indent=1))
    return result


def _machine(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "versions": versions()}


def _write(path: Path, text: str) -> None:
    save_file(path, lambda partial: partial.write_text(text))


def run_all(jobs: Sequence[Job], processes: int) -> dict[Job, ablation.Result]:
    """Run what is not finished, `processes` at a time, and say each result."""
    results = {job: result for job in jobs if (result := finished(job)) is not None}
    left = [job for job in jobs if job not in results]
    print(f"{len(results)} of {len(jobs)} runs are finished, {len(left)} to go", flush=True)
    for job, result in _results(left, processes):
        results[job] = result
        print(f"{job.row}  seed {job.seed}  top-1 {result.top1:.2f} %  {result.seconds:.0f} s")
        sys.stdout.flush()
    return {job: results[job] for job in jobs}


def _results(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, ablation.Result]]:
    if processes == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(processes):
        numbers.put(number)
    initial = {"initializer": _start_process, "initargs": (numbers, processes)}
    with ProcessPoolExecutor(processes, mp_context=context, **initial) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_process(numbers: SimpleQueue[int], processes: int) -> None:
    """Give a process of the pool its share of the CPU cores, and its GPU."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def write_report(folder: Path, table: str, results: Mapping[Job, ablation.Result]) -> list[Path]:
    """Write the four files of a table and return their paths. Rows come in the table's order."""
    order = list(TABLES[table])
    found = sorted(results.values(), key=lambda result: (order.index(result.row), result.seed))
    paths = [folder / name for name in ("runs.csv", "table.md", "plot.png", "runs.json")]
    save_file(paths[0], lambda path: ablation.write_csv(path, found))
    _write(paths[1], ablation.markdown(table, found))
    save_file(paths[2], lambda path: ablation.plot(path, table, found))
    _write(paths[3], json.dumps([asdict(result) for result in found], indent=1))
    return paths


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument(
        "--data", required=True, type=path_argument, metavar="DIR", help="cluttered digits"
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--cfg", type=path_argument, default="ablation", metavar="YAML", help="model and recipe"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows of the table")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each row")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training set")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="any keys"
    )
    args = parser.parse_args(argv)
    unknown = [row for row in args.rows or () if row not in TABLES[args.table]]
    if unknown:
        rows = ", ".join(TABLES[args.table])
        parser.error(f"--rows: expected some of {rows}, got {unknown[0]}")
    if args.seeds < 1 or args.jobs < 1:
        parser.error("expected --seeds and --jobs of 1 or more")
    return args


@lasting_console()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = _parse_args(argv)
    try:
        jobs = plan(args)
        for job in jobs:  # a wrong setting is told before anything runs
            job.load()
        results = run_all(jobs, args.jobs)
        paths = write_report(args.output / args.table, args.table, results)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
