"""Train on the digits in several precisions, and as a CUDA graph: the loss curves must agree.

    python tools/make_digits.py datasets/digits
    python -m benchmarks.loss_curves --data datasets/digits --output benchmarks/loss_curves

Writes OUTPUT.csv and draws OUTPUT.png, a curve at a time. All variants start from the same weights,
see the same batches and get the same seed before each step. float16 skips a few steps at first,
while it finds its loss scale.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DistributedSampler

from benchmarks.bench_models import machine
from quadmamba.configs import load_cfg
from quadmamba.data import DataError, build_loaders
from quadmamba.models import build_model
from quadmamba.utils.distributed import World
from quadmamba.utils.engine import seed_step
from quadmamba.utils.modes import build_stepper, placed

# TRAIN.AMP and TRAIN.COMPILE of each curve; the first is what the others are compared with
VARIANTS = {
    "fp32": ("off", "off"),
    "fp16": ("fp16", "off"),
    "graph": ("fp16", "graph"),
    "bf16": ("bf16", "off"),
}
COLORS = {"fp32": "black", "fp16": "crimson", "bf16": "royalblue", "graph": "darkorange"}
SMOOTH = 5  # steps in a mean where curves are compared and drawn
WIDTH, HEIGHT, MARGIN = 720, 420, 48
Batches = list[tuple[Tensor, Tensor]]


def settings(args: argparse.Namespace, variant: str) -> dict[str, object]:
    """Configuration keys of a curve."""
    amp, compiled = VARIANTS[variant]
    keys = {"DATA.PATH": args.data, "DATA.WORKERS": 0, "DEVICE": args.device}
    return {**keys, "TRAIN.AMP": amp, "TRAIN.COMPILE": compiled}


def batches_of(args: argparse.Namespace) -> tuple[Batches, int]:
    """As many training batches as there are steps, on the device; and their number in an epoch."""
    cfg = load_cfg("digits", settings(args, "fp32"))
    loader = build_loaders(cfg, rank=0, world_size=1, with_train=True).train
    batches: Batches = []
    while len(batches) < args.steps:
        cast(DistributedSampler, loader.sampler).set_epoch(len(batches))
        batches += [(images.to(args.device), targets.to(args.device)) for images, targets in loader]
    return batches[: args.steps], len(loader)


def train(args: argparse.Namespace, variant: str, batches: Batches, epoch: int) -> list[float]:
    """The loss of each step; epoch: steps in an epoch, for the schedule."""
    cfg = load_cfg("digits", settings(args, variant))
    world = World(device=torch.device(args.device))
    torch.manual_seed(cfg.TRAIN.SEED)
    model = placed(build_model(cfg, num_classes=10), world).train()
    stepper = build_stepper(cfg, world, model, mixed=False, updates=epoch)
    losses = []
    for step, (images, targets) in enumerate(batches):
        seed_step(cfg.TRAIN.SEED, 0, step, 0)
        losses.append(stepper.backward(images, targets, parts=1, last=True).clone())
        stepper.update()
    print(f"{variant}: {int(stepper.skipped)} steps skipped", flush=True)
    return torch.stack(losses).tolist()


def smooth(values: Sequence[float]) -> list[float]:
    """Means over SMOOTH values, fewer at the beginning."""
    windows = (values[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def report(curves: Mapping[str, Sequence[float]]) -> None:
    """Print where each curve begins and ends, and its largest distance to the first one."""
    first = smooth(next(iter(curves.values())))
    for variant, losses in curves.items():
        line = smooth(losses)
        gap = max(abs(a - b) for a, b in zip(line, first))
        print(f"{variant:<6} {losses[0]:.4f} -> {line[-1]:.4f}  largest gap {gap:.4f}", flush=True)


def draw(curves: Mapping[str, Sequence[float]], title: str) -> Image.Image:
    """The smoothed curves over the steps."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    top = max(max(losses) for losses in curves.values())
    steps = max(2, max(len(losses) for losses in curves.values()))

    def at(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / (steps - 1)
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * loss / top

    pen.text((MARGIN, MARGIN // 3), title, fill="black")
    for i in range(5):
        loss, step = top * i / 4, (steps - 1) * i / 4
        pen.line([at(0, loss), at(steps - 1, loss)], fill="gainsboro")
        pen.text((MARGIN // 4, at(0, loss)[1] - 6), f"{loss:.2f}", fill="black")
        pen.text((at(step, 0)[0] - 6, HEIGHT - MARGIN + 6), f"{step:.0f}", fill="black")
    for i, (variant, losses) in enumerate(curves.items()):
        points = [at(step, loss) for step, loss in enumerate(smooth(losses))]
        pen.line(points, fill=COLORS[variant], width=2)
        pen.text((WIDTH - 2 * MARGIN, MARGIN + 14 * i), variant, fill=COLORS[variant])
    return picture


def main(argv: list[str] | None = None) -> int:
    """Train, write and draw; 2 where there is no data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that tools/make_digits.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="path without its suffix")
    names = list(VARIANTS)
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    try:
        batches, epoch = batches_of(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    common = machine(torch.device(args.device))
    words = sys.argv[1:] if argv is None else argv
    common["command"] = shlex.join(["python", "-m", "benchmarks.loss_curves", *words])
    curves: dict[str, list[float]] = {}
    title = f"loss on the digits, mean of {SMOOTH} steps; {common['gpu']}"
    with args.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["variant", "step", "loss", *common])
        writer.writeheader()
        for variant in args.variants:
            curves[variant] = train(args, variant, batches, epoch)
            rows = ({"step": i, "loss": loss} for i, loss in enumerate(curves[variant]))
            writer.writerows({"variant": variant, **row, **common} for row in rows)
            file.flush()
            draw(curves, title).save(args.output.with_suffix(".png"))
    report(curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
