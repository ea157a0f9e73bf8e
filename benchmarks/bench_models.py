"""Time whole models side by side on one GPU: ours, Swin, ConvNeXt and ResNet-50 of timm.

    python -m benchmarks.bench_models --csv benchmarks/models.csv

Random images on the device, 1000 classes, float16 autocast. Inference: eval mode without gradients.
Training: cross-entropy, GradScaler, a fused AdamW step, drop path on, the backward pass on the
calling thread as in a run of main.py. Each figure is the mean of some steps after a warm-up, with
one wait for the device at the end. `graph` runs the forward pass, or forward and backward together,
as a CUDA graph. GROWN is measured at more image sizes, with batches of about as many tokens. A line
is printed and written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton.errors import TritonError

from quadmamba.configs import load_cfg
from quadmamba.models import build_model
from quadmamba.utils.graphs import GraphedBackward, GraphedCall
from quadmamba.utils.stepper import autocast, backward_here
from quadmamba.utils.throughput import timed

CLASSES = 1000
GROWN = "quadmamba_small"
OURS = (GROWN, "quadmamba_base", "quadmamba_lite", "quadmamba_tiny")
# Models of timm: drop path of their recipes, and whether they work channels last
PEERS = {
    "swin_tiny_patch4_window7_224": (0.2, False),
    "convnext_tiny": (0.1, True),
    "resnet50": (0.05, True),
    "swin_small_patch4_window7_224": (0.3, False),
    "convnext_small": (0.4, True),
}
Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """A model (a name of OURS or PEERS) and the batch of images that it gets."""

    model: str
    height: int
    width: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens at stride 4, of which all models but ResNet-50 have one for 4 x 4 pixels."""
        return self.batch * -(-self.height // 4) * -(-self.width // 4)


class Trial:
    """A model with its images and its optimizer, ready to be timed."""

    def __init__(self, case: Case, device: torch.device, amp: str) -> None:
        torch.manual_seed(0)
        self.device, self.amp = device, amp
        ours = case.model in OURS
        drop_path, channels_last = (0.0, True) if ours else PEERS[case.model]
        if ours:
            self.model: nn.Module = build_model(load_cfg(case.model), CLASSES)
        else:
            self.model = timm.create_model(
                case.model, num_classes=CLASSES, drop_path_rate=drop_path
            )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(device, memory_format=layout)
        size = (case.batch, 3, case.height, case.width)
        self.images = torch.randn(size, device=device).contiguous(memory_format=layout)
        self.targets = torch.randint(CLASSES, (case.batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16" and on_gpu(device))

    @torch.no_grad()
    def infer(self, images: Tensor) -> Tensor:
        """Logits (b, CLASSES)."""
        with autocast(self.device, self.amp):
            return self.model(images)

    def backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss, after its backward pass."""
        with autocast(self.device, self.amp):
            loss = F.cross_entropy(self.model(images), targets)
        with backward_here():
            self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> None:
        """The step of the optimizer."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def time(self, phase: str, mode: str, warmup: int, steps: int) -> tuple[float, float]:
        """Seconds of a step, and the peak memory in 10^9 bytes."""
        graph = mode == "graph"
        if phase == "inference":
            self.model.eval()
            infer = GraphedCall(self.infer) if graph else self.infer
            return timed(lambda: infer(self.images), self.device, warmup, steps)
        self.model.train()
        params = list(self.model.parameters())
        backward = GraphedBackward(self.backward, params) if graph else self.backward

        def step() -> None:
            backward(self.images, self.targets)
            self.update()

        if graph:  # the optimizer makes its state, which belongs to the memory of a step
            self.backward(self.images, self.targets)
            self.update()
        return timed(step, self.device, warmup, steps)


def on_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU."""
    return device.type == "cuda"


def measure(case: Case, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of one model at one size, each as it is measured; a failure is a row of its own."""
    device = torch.device(args.device)
    trial = Trial(case, device, args.amp)
    row = {"model": case.model, "height": case.height, "width": case.width, "batch": case.batch}
    row["params_m"] = sum(param.numel() for param in trial.model.parameters()) / 1e6
    for mode in args.modes:
        for phase in args.phases:
            at = {**row, "mode": mode, "phase": phase}
            try:
                seconds, memory = trial.time(phase, mode, args.warmup, args.steps)
            except (RuntimeError, TritonError) as error:  # memory, or what cannot be recorded
                yield {**at, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            finally:
                trial.optimizer.zero_grad(set_to_none=True)
                free()
            yield {
                **at,
                "img_s": case.batch / seconds,
                "ms": 1e3 * seconds,
                "memory_gb": memory,
                "ns_per_token": 1e9 * seconds / case.tokens,
                "bytes_per_token": 1e9 * memory / case.tokens,
            }


def free() -> None:
    """Give back the memory of what is no longer used, that of graphs included."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps one for each stream that recorded
        torch.cuda.empty_cache()


def machine(device: torch.device) -> Row:
    """The machine and the software that a measurement belongs to."""
    software = {"torch": torch.__version__, "timm": timm.__version__, "cuda": torch.version.cuda}
    if not on_gpu(device):
        return {"gpu": f"none, {platform.machine()} CPU", **software}
    from benchmarks.bench_kernels import versions  # it needs the GPU's packages

    return {**software, **versions()}


def cases(args: argparse.Namespace) -> list[Case]:
    """GROWN at all sizes comes right after the first model, so that a cut-off run has it."""
    side = args.size
    listed = [Case(name, side, side, args.batch) for name in args.models]
    grown = [
        Case(GROWN, height, width, max(1, round(args.batch * side**2 / (height * width))))
        for height, width in args.growth
    ]
    return [*listed[:3], *grown, *listed[3:]]


def size_of(text: str) -> tuple[int, int]:
    """384 or 1280x800 as (height, width)."""
    sides = [int(part) for part in text.split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(text)
    return sides[0], sides[-1]


def show(row: Row) -> str:
    """One line of the console table."""
    head = f"{row['model']:<30} {row['height']:>4}x{row['width']:<4} b{row['batch']:<4}"
    head += f" {row['mode']:<5} {row['phase']:<9}"
    if "error" in row:
        return f"{head} failed: {row['error']}"
    return (
        f"{head} {row['img_s']:>9.1f} img/s {row['ms']:>8.2f} ms {row['memory_gb']:>6.2f} GB"
        f" {row['ns_per_token']:>7.1f} ns/token {row['bytes_per_token']:>8.0f} B/token"
    )


COLUMNS = [
    *("model", "params_m", "height", "width", "batch", "mode", "phase", "img_s", "ms"),
    *("memory_gb", "ns_per_token", "bytes_per_token", "error", "amp", "warmup", "steps"),
    *("gpu", "driver", "torch", "triton", "cuda", "timm", "command"),
]


def growth(rows: Sequence[Row]) -> list[str]:
    """How far time and memory per token of GROWN lie apart over its sizes, a line a mode."""
    lines = []
    for mode, phase in dict.fromkeys((row["mode"], row["phase"]) for row in rows):
        own = [r for r in rows if (r["model"], r["mode"], r["phase"]) == (GROWN, mode, phase)]
        own = [row for row in own if "error" not in row]
        parts = []
        for key in ("ns_per_token", "bytes_per_token"):
            values = [cast(float, row[key]) for row in own]
            if len(values) > 1 and min(values) > 0:
                parts.append(f"{key} +{100 * (max(values) / min(values) - 1):.1f} %")
        if parts:
            lines.append(f"{GROWN} {mode} {phase} over {len(own)} sizes: {', '.join(parts)}")
    return lines


def run(args: argparse.Namespace, command: str, file: TextIO | None) -> bool:
    """Print and write the rows; whether all could be measured."""
    common = {key: getattr(args, key) for key in ("amp", "warmup", "steps")}
    common |= {**machine(torch.device(args.device)), "command": command}
    print("  ".join(f"{key} {value}" for key, value in common.items()), flush=True)
    writer = csv.DictWriter(file, COLUMNS) if file else None
    if writer:
        writer.writeheader()
    rows: list[Row] = []
    for case in cases(args):
        for row in measure(case, args):
            print(show(row), flush=True)
            rows.append(row)
            if file and writer:
                writer.writerow({**common, **row})
                file.flush()
        free()
    print(*growth(rows), sep="\n", flush=True)
    return all("error" not in row for row in rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [OURS[0], *list(PEERS)[:3], *OURS[1:], *list(PEERS)[3:]]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "graph"), default=["eager", "graph"]
    )
    phases = ("inference", "training")
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases)
    parser.add_argument("--size", type=int, default=224, help="side of the images of all models")
    grown = [(384, 384), (512, 512), (1280, 800)]
    sizes = {"type": size_of, "metavar": "HxW", "default": grown}
    parser.add_argument("--growth", nargs="*", **sizes, help=f"more sizes for {GROWN}")
    parser.add_argument("--batch", type=int, default=128, help="images, at --size")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--amp", choices=("fp16", "bf16", "off"), default="fp16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none (--device cpu measures the CPU)")
    if args.device == "cpu" and "graph" in args.modes:
        parser.error("--modes graph: expected --device cuda, got cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line asks for; 1 where a row failed."""
    args = parse(argv)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks.bench_models", *words])
    if args.csv is None:
        return not run(args, command, None)
    with args.csv.open("w", newline="") as file:
        return not run(args, command, file)


if __name__ == "__main__":
    sys.exit(main())
