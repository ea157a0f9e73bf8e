"""Host time of the model's ops: what Python, autograd and launches cost, whatever the kernels do.

    python -m benchmarks.bench_host --csv host.csv

Inputs are tiny, so the device waits for the host. Each op is timed beside the PyTorch ops in its
place, and each mixer and block beside its parts: forward without gradients; forward and backward;
and the same with the backward pass on the calling thread. The launches of each are counted by the
profiler, which also says how long one call of the driver takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_kernels import DTYPES, versions
from benchmarks.tables import write_csv
from quadmamba.kernels import fused
from quadmamba.models import plain
from quadmamba.models.orders import build_order
from quadmamba.models.quadmamba import Block
from quadmamba.models.ss2d import SS2D, QuadSS2D

SIDE, DIM = 8, 32
Call = Callable[[], Tensor]
Row = dict[str, object]


def host_us(call: Callable[[], object], *, rounds: int = 7, calls: int = 100) -> float:
    """Microseconds of one call on the host: the best of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def launches(call: Callable[[], object]) -> tuple[int, float]:
    """Kernels that one call launches, and the mean microseconds of a launch in the driver."""
    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    found = [event for event in seen.events() if "LaunchKernel" in event.name]
    return len(found), sum(event.cpu_time_total for event in found) / max(len(found), 1)


def under_autocast(call: Call, dtype: torch.dtype) -> Tensor:
    """The result of `call`, run as training does."""
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        return call()


def by_parts(call: Call) -> Tensor:
    """The result of `call` where no node runs."""
    devices, plain.DEVICES = plain.DEVICES, set()
    try:
        return call()
    finally:
        plain.DEVICES = devices


def through(block: Block, x: Tensor) -> Tensor:
    """Both results of a block within a stage as one."""
    total, (values, _) = block(x, (x, None), (None, None))
    return total + values


def cases(dtype: torch.dtype) -> dict[str, tuple[Call, list[Tensor]]]:
    """Name -> (call, leaves): our ops, and PyTorch's where it has them."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", requires_grad=True)

    x = torch.randn(1, SIDE, SIDE, DIM, device="cuda", dtype=dtype, requires_grad=True)
    scale, shift, square = leaf(DIM), leaf(DIM), leaf(DIM, DIM)
    filters, wide, high, narrow = leaf(DIM, 1, 3, 3), leaf(4 * DIM, DIM), leaf(4 * DIM), leaf(DIM)
    back = leaf(DIM, 4 * DIM)
    first, second = (wide, high), (back, narrow)

    def plain_conv() -> Tensor:
        grid = F.conv2d(x.permute(0, 3, 1, 2), filters, padding=1, groups=DIM)
        return F.silu(grid).permute(0, 2, 3, 1)

    found = {
        "layer_norm": (lambda: fused.layer_norm(x, scale, shift), [scale, shift]),
        "layer_norm, PyTorch": (lambda: F.layer_norm(x, (DIM,), scale, shift), [scale, shift]),
        "linear": (lambda: fused.linear(x, square), [square]),
        "linear, PyTorch": (lambda: F.linear(x, square), [square]),
        "dwconv_silu": (lambda: fused.dwconv_silu(x, filters), [filters]),
        "dwconv_silu, PyTorch": (plain_conv, [filters]),
        "mlp": (lambda: fused.mlp(x, *first, *second), [*first, *second]),
        "mlp, PyTorch": (
            lambda: F.linear(F.gelu(F.linear(x, *first)), *second),
            [*first, *second],
        ),
    }
    mixers = {
        "mixer, raster": SS2D(DIM, order=build_order("raster")),
        "mixer, quadtree": QuadSS2D(DIM, order=build_order("quadtree")),
    }
    for name, mixer in mixers.items():
        block = Block(DIM, op=mixer, mlp_ratio=4.0).cuda().train()
        call, leaves = partial(mixer, x), list(mixer.parameters())
        whole, all_leaves = partial(through, block, x), list(block.parameters())
        found[name] = call, leaves
        found[f"{name}, by parts"] = partial(by_parts, call), leaves
        found[name.replace("mixer", "block")] = whole, all_leaves
        found[f"{name.replace('mixer', 'block')}, by parts"] = partial(by_parts, whole), all_leaves
    for name, (call, leaves) in found.items():
        found[name] = partial(under_autocast, call, dtype), [x, *leaves]
    return found


def measure(call: Call, leaves: Sequence[Tensor]) -> Row:
    """The times and launches of one op."""
    grad = torch.randn_like(call())

    def both() -> None:
        call().backward(grad)
        for tensor in leaves:
            tensor.grad = None

    with torch.no_grad():
        row: Row = {"forward_us": host_us(call)}
    row["both_us"] = host_us(both)
    with torch.autograd.set_multithreading_enabled(False):
        row["both_one_thread_us"] = host_us(both)
    row["launches"], row["launch_us"] = launches(both)
    return row


def main(argv: list[str] | None = None) -> None:
    """Command line: one line an op, and a CSV of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("bench_host: expected a CUDA GPU, found none")
    rows: list[Row] = []
    common = {"dtype": args.dtype, **versions()}
    for name, (call, leaves) in cases(DTYPES[args.dtype]).items():
        rows.append({"op": name, **measure(call, leaves), **common})
        print(*(f"{v:.1f}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    if args.csv:
        write_csv(args.csv, rows, list(rows[0]))


if __name__ == "__main__":
    main()
