"""Images per second and core of the training pipeline, beside timm's `create_loader`.

    python -m benchmarks.bench_loader --csv benchmarks/loader.csv
    python -m benchmarks.bench_loader --profile        # seconds by function

Writes 2,000 JPEGs of 500x375 (random crops and flips of scikit-learn's two sample photographs) and
reads them through both loaders with the same augmentation: random resized crop, flip, RandAugment,
random erasing. `bytes` is the part that CPU cores do when there is a GPU, `floats` adds what else
the prefetcher does on --device: normalise and erase. The loaders take turns. Images per second are
per core: by the clock (workers, or the one process), and by the CPU time of all processes together.
"""

from __future__ import annotations

import argparse
import cProfile
import platform
import pstats
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import PIL
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageDataset, create_loader
from yacs.config import CfgNode

from benchmarks.tables import write_csv
from quadmamba.configs import load_cfg
from quadmamba.data import build_loaders
from quadmamba.data.augment import keep_a_bit
from quadmamba.data.datasets import collate

WIDTH, HEIGHT = 500, 375
SHARED = "/dev/shm"
Row = dict[str, object]


def make_images(root: Path, count: int, quality: int, seed: int = 0) -> int:
    """Write `count` training JPEGs in two classes, and one to validate; returns their bytes."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = random.Random(seed)
    written = 0
    for part, images in (("train", count), ("val", 2)):
        for i in range(images):
            photo = photos[i % 2]
            left = rng.randint(0, photo.width - WIDTH)
            top = rng.randint(0, photo.height - HEIGHT)
            crop = photo.crop((left, top, left + WIDTH, top + HEIGHT))
            if rng.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            path = root / part / str(i % 2) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            crop.save(path, quality=quality)
            written += path.stat().st_size
    return written


def configure(root: Path, args: argparse.Namespace) -> CfgNode:
    """Our defaults, which are the augmentation of the recipe."""
    flags = {"DATA.PATH": str(root), "DATA.BATCH_SIZE": args.batch, "DATA.WORKERS": args.workers}
    return load_cfg(flags=flags | {"DEVICE": args.device})


def ours(cfg: CfgNode) -> Iterable:
    """Our training batches."""
    return build_loaders(cfg, device=torch.device(cfg.DEVICE)).train


def timms(cfg: CfgNode) -> Iterable:
    """timm's training batches, with its prefetcher and the augmentation of `cfg`."""
    aug = cfg.AUG
    loader = create_loader(
        ImageDataset(str(Path(cfg.DATA.PATH) / "train")),
        cfg.DATA.IMG_SIZE,
        cfg.DATA.BATCH_SIZE,
        is_training=True,
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        scale=tuple(aug.SCALE),
        hflip=aug.HFLIP,
        auto_augment=aug.AUTO_AUGMENT,
        interpolation=cfg.DATA.INTERPOLATION,
        num_workers=cfg.DATA.WORKERS,
        persistent_workers=False,
        pin_memory=cfg.DATA.PIN_MEMORY and cfg.DEVICE == "cuda",
        device=torch.device(cfg.DEVICE),
    )
    keep_a_bit(loader.dataset.transform)
    loader.loader.timeout = cfg.DATA.TIMEOUT if cfg.DATA.WORKERS else 0
    return loader


def ours_here(cfg: CfgNode) -> Iterable:
    """Our training batches, read in this thread: a profiler sees no other."""
    loader = build_loaders(cfg, device=torch.device(cfg.DEVICE)).train
    read = loader.dataset.__getitem__
    return loader.prefetcher(collate(list(map(read, draws))) for draws in loader.batch_sampler)


def our_bytes(cfg: CfgNode) -> Iterable:
    """Our training batches as they go to a GPU: bytes, normalised and erased over there."""
    return ((batch.images, batch.targets) for batch in build_loaders(cfg).train.fleeting_batches())


def timm_bytes(cfg: CfgNode) -> Iterable:
    """timm's training batches as its prefetcher gets them."""
    return timms(cfg).loader


LOADERS: dict[str, dict[str, Callable[[CfgNode], Iterable]]] = {
    "bytes": {"ours": our_bytes, "timm": timm_bytes},
    "floats": {"ours": ours, "timm": timms},
}


def cpu_seconds() -> float:
    """Seconds of CPU that this process and its finished children used."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def time_epoch(build: Callable[[CfgNode], Iterable], cfg: CfgNode) -> Row:
    """Read one epoch; images per second and core by wall-clock and by CPU time."""
    wall, cpu, images = time.perf_counter(), cpu_seconds(), 0
    loader = build(cfg)
    for batch, _ in loader:
        images += len(batch)
    if cfg.DEVICE == "cuda":
        torch.cuda.synchronize()
    del loader  # ends its workers, whose CPU time counts from then on
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    cores = max(1, cfg.DATA.WORKERS)
    rates = {"img_s_core_clock": images / wall / cores, "img_s_core_cpu": images / cpu}
    return {"images": images, **rates}


def compare(cfg: CfgNode, repetitions: int) -> Iterator[Row]:
    """Rows of both loaders in turn; which one is first changes from pair to pair."""
    for repetition in range(repetitions):
        for until, loaders in LOADERS.items():
            for name in sorted(loaders, reverse=repetition % 2 == 1):
                row = {"repetition": repetition, "until": until, "loader": name}
                yield row | time_epoch(loaders[name], cfg)


def summarise(rows: list[Row]) -> None:
    """Print the median of each loader, and the ratio of the pairs with its spread."""
    for until in LOADERS:
        for key in ("img_s_core_clock", "img_s_core_cpu"):
            rates = {
                name: [row[key] for row in rows if (row["until"], row["loader"]) == (until, name)]
                for name in LOADERS[until]
            }
            ratios = [a / b for a, b in zip(rates["ours"], rates["timm"])]
            print(
                f"{until:6} {key:16}  ours {statistics.median(rates['ours']):.0f}  "
                f"timm {statistics.median(rates['timm']):.0f}  ratio "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def profile(build: Callable[[CfgNode], Iterable], cfg: CfgNode, lines: int = 16) -> None:
    """Print where the time of one epoch goes, by function."""
    recorder = cProfile.Profile()
    recorder.runcall(time_epoch, build, cfg)
    stats = pstats.Stats(recorder)
    print(build.__name__)
    stats.strip_dirs().sort_stats("tottime").print_stats(lines)


def too_little_shared_memory(args: argparse.Namespace) -> str:
    """What to say where timm's workers would wait for ever; ours need none of it."""
    needed = 2 * args.workers * args.batch * 3 * load_cfg().DATA.IMG_SIZE ** 2
    free = shutil.disk_usage(SHARED).free if Path(SHARED).is_dir() else needed
    if free >= needed:
        return ""
    return (
        f"timm's loader passes batches through {SHARED}: expected {needed / 1e6:.0f} MB free, got "
        f"{free / 1e6:.0f}; docker run --shm-size gives more, fewer --workers need less"
    )


def versions() -> Row:
    """What ran, for every row of the CSV."""
    return {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
    }


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="0: all in one process")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of `floats`")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--profile", action="store_true", help="seconds by function, no comparison")
    args = parser.parse_args(argv)
    if message := too_little_shared_memory(args):
        parser.error(message)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        size = make_images(Path(folder), args.images, args.quality)
        print(f"{args.images} JPEGs of {WIDTH}x{HEIGHT}, {size / args.images / 1e3:.0f} kB each")
        cfg = configure(Path(folder), args)
        if args.profile:
            for build in (ours_here, timms):
                profile(build, cfg)
            return 0
        rows = []
        for row in compare(cfg, args.repetitions):
            rows.append({**row, "workers": args.workers, "batch": args.batch, **versions()})
            print(*(f"{v:.0f}" if isinstance(v, float) else v for v in row.values()), flush=True)
    summarise(rows)
    if args.csv:
        write_csv(args.csv, rows, list(rows[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
