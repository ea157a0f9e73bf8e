"""Time the kernels, mixer and block on a GPU, against the reference and the official sequence.

    python -m benchmarks.bench_kernels --what op block scan gather --csv benchmarks/kernels.csv

Providers: `ours`, `graph` (the mixer as a CUDA graph, so that nothing waits for the host),
`reference` (the PyTorch definition), `official` (its operations restated by us, with our scan
kernel in place of its own). Medians of CUDA-event timings, backward passes on the calling thread
as in training; bytes are the fewest that the operation must read and write; the copy they are
compared with is measured in the same run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.official import OfficialMixer
from benchmarks.plain import PlainMixer
from benchmarks.tables import write_csv
from quadmamba.configs import load_cfg
from quadmamba.kernels import selective_scan as ss
from quadmamba.kernels.quadtree_gather import (
    gather_in,
    gather_in_ref,
    gather_out,
    gather_out_ref,
    invert_maps,
)
from quadmamba.models import build_model
from quadmamba.models.layers import add
from quadmamba.models.orders import QuadtreeOrder
from quadmamba.models.quadmamba import Block
from quadmamba.models.ss2d import SS2D
from quadmamba.utils.graphs import GraphedBackward, GraphedCall
from quadmamba.utils.stepper import backward_here

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PROVIDERS = ("ours", "graph", "reference", "official")
Row = dict[str, object]


def median_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of `run` on the GPU."""
    return triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def copy_rate() -> float:
    """Bytes per second of a large device-to-device copy, read plus written."""
    source = torch.randint(0, 100, (1 << 29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)


def clear_grads(tensors: list[Tensor]) -> None:
    """Drop the gradients, so that each backward writes and does not add."""
    for tensor in tensors:
        tensor.grad = None


def time_directions(forward: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float]:
    """Milliseconds of forward (no gradients kept), backward, and both."""

    def both() -> None:
        clear_grads(leaves)
        forward().backward(grad)

    with torch.no_grad():
        ms = {"forward": median_ms(forward)}
        grad = torch.randn_like(forward())
    y = forward()

    def backward() -> None:
        clear_grads(leaves)
        y.backward(grad, retain_graph=True)

    with backward_here():
        return {**ms, "both": median_ms(both), "backward": median_ms(backward)}


def stages(names: list[str], batch: int) -> Iterator[tuple[str, int, Block, tuple[int, ...]]]:
    """(model, stage, block, shape of its input) of every stage of the named configurations."""
    for name in names:
        model = build_model(load_cfg(name)).cuda()
        for i, blocks in enumerate(model.stages):
            side = 224 // model.strides[i]
            yield name, i + 1, blocks[-1], (batch, side, side, model.out_channels[i])


def autocast(mixer: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Run `mixer` as training does."""
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        return mixer(x)


def saved_gb(forward: Callable[[], Tensor]) -> float:
    """What `forward` keeps for the backward pass beside its output, in 10^9 bytes."""
    forward()
    before = torch.cuda.memory_allocated()
    y = forward()
    return (torch.cuda.memory_allocated() - before - y.nbytes) / 1e9


def bench_op(args: argparse.Namespace) -> Iterator[Row]:
    """The whole mixer, in_proj to out_proj, in training mode under autocast."""
    dtype = DTYPES[args.dtype]
    for name, stage, block, shape in stages(args.models, args.batch):
        op = block.op.train()
        official = OfficialMixer(op, ss.selective_scan)
        mixers = {"ours": op, "reference": PlainMixer(op), "official": official}
        for provider in [p for p in args.providers if p in mixers]:
            x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
            forward = partial(autocast, mixers[provider].train(), x, dtype)
            saved = {"saved_gb": saved_gb(forward)}
            row = {"kernel": "op", "provider": provider, "model": name, "stage": stage, **saved}
            for direction, ms in time_directions(forward, [x, *op.parameters()]).items():
                yield {**row, "direction": direction, "ms": ms}
        if "graph" in args.providers:
            x = torch.randn(shape, device="cuda", dtype=dtype)
            row = {"kernel": "op", "provider": "graph", "model": name, "stage": stage}
            for direction, ms in time_graphs(op, x, dtype).items():
                yield {**row, "direction": direction, "ms": ms}


def bench_block(args: argparse.Namespace) -> Iterator[Row]:
    """The whole block and the sum that follows the last one of a stage, as `bench_op`."""
    dtype = DTYPES[args.dtype]

    def call(x: Tensor, branch: Tensor, block: Block) -> Tensor:
        return add(*block(x, (branch, None), (None, None)))

    if "ours" not in args.providers:
        return
    for name, stage, block, shape in stages(args.models, args.batch):
        x, branch = (
            torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
        )
        forward = partial(autocast, partial(call, branch=branch, block=block.train()), x, dtype)
        row = {"kernel": "block", "provider": "ours", "model": name, "stage": stage}
        row["saved_gb"] = saved_gb(forward)
        for direction, ms in time_directions(forward, [x, branch, *block.parameters()]).items():
            yield {**row, "direction": direction, "ms": ms}


def time_graphs(mixer: SS2D, x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of the forward pass, and of both, as CUDA graphs."""
    grad = torch.randn_like(x)

    def both(x: Tensor) -> Tensor:
        y = autocast(mixer, x.detach().requires_grad_(), dtype)
        y.backward(grad)
        return y.detach()

    forward = GraphedCall(partial(autocast, mixer, dtype=dtype))
    graphs = {"forward": forward, "both": GraphedBackward(both, list(mixer.parameters()))}
    return {direction: median_ms(partial(graph, x)) for direction, graph in graphs.items()}


def bench_scan(args: argparse.Namespace) -> Iterator[Row]:
    """The standard selective scan in the layout (b, k·d, l)."""
    dtype = DTYPES[args.dtype]
    providers = {"ours": ss.selective_scan, "reference": ss.selective_scan_ref}
    for name, stage, block, (b, h, w, _) in stages(args.models, args.batch):
        k, d, n = block.op.ssm.A_log.shape
        wide = [torch.randn(b, k * d, h * w, device="cuda", dtype=dtype) for _ in range(2)]
        thin = [torch.randn(b, k, n, h * w, device="cuda", dtype=dtype) for _ in range(2)]
        A, D, bias = (torch.ones(k * d, *more, device="cuda") for more in ((n,), (), ()))
        leaves = [t.requires_grad_() for t in (*wide, -A, *thin, D, bias)]
        once = {"forward": 3 * leaves[0].nbytes + 2 * thin[0].nbytes}
        once["backward"] = 5 * leaves[0].nbytes + 4 * thin[0].nbytes
        once["both"] = once["forward"] + once["backward"]
        u, delta, A, B, C, D, bias = leaves
        for provider in [p for p in args.providers if p in providers]:
            named = {"delta_bias": bias, "delta_softplus": True}
            forward = partial(providers[provider], u, delta, A, B, C, D, **named)
            row = {"kernel": "scan", "provider": provider, "model": name, "stage": stage}
            for direction, ms in time_directions(forward, leaves).items():
                yield {**row, "direction": direction, "ms": ms, "bytes": once[direction]}


def bench_gather(args: argparse.Namespace) -> Iterator[Row]:
    """Tokens to the quadtree sequence and back, with the gradient of the decision."""
    providers = {
        "ours": {"gather_in": gather_in, "gather_out": gather_out},
        "reference": {"gather_in": gather_in_ref, "gather_out": gather_out_ref},
    }
    for name, stage, block, (b, h, w, _) in stages(args.models, args.batch):
        op = block.op
        if not isinstance(op.order, QuadtreeOrder):
            continue
        maps = op.order.maps(h, w, op.shift(h, w), torch.device("cuda"))
        size = (b, h * w, op.ssm.D.shape[-1])
        x = torch.randn(size, device="cuda", dtype=DTYPES[args.dtype])
        inverse = invert_maps(maps.fine, maps.coarse)
        decision = torch.eye(4, device="cuda")[torch.randint(4, (b,))]
        leaves = [x.requires_grad_(), decision.requires_grad_()]
        once = {"forward": 2 * x.nbytes, "backward": 3 * x.nbytes, "both": 5 * x.nbytes}
        for provider in [p for p in args.providers if p in providers]:
            for kernel, gather in providers[provider].items():
                more = {"inverse": inverse} if provider == "ours" else {}
                forward = partial(gather, *leaves, maps.fine, maps.coarse, maps.quadrant, **more)
                row = {"kernel": kernel, "provider": provider, "model": name, "stage": stage}
                for direction, ms in time_directions(forward, leaves).items():
                    yield {**row, "direction": direction, "ms": ms, "bytes": once[direction]}


def show(row: Row) -> str:
    """One line of the console table."""
    values = (row.get(column, "") for column in COLUMNS[:12])
    return " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)


def versions() -> Row:
    """The machine and the software that a measurement belongs to."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


BENCHES = {"op": bench_op, "block": bench_block, "scan": bench_scan, "gather": bench_gather}
COLUMNS = [
    *("kernel", "provider", "model", "stage", "direction", "dtype", "batch", "ms", "bytes"),
    *("tb_per_s", "of_copy", "saved_gb", "gpu", "driver", "torch", "triton", "cuda"),
]


def main(argv: list[str] | None = None) -> None:
    """Command line: print one line a measurement, and write all of them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--models", nargs="+", default=["quadmamba_small"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("bench_kernels: expected a CUDA GPU, found none")
    copy = copy_rate()
    common = {"dtype": args.dtype, "batch": args.batch, **versions()}
    print(f"{common['gpu']}, copy {copy / 1e12:.2f} TB/s")
    rows: list[Row] = []
    for what in args.what:
        for row in BENCHES[what](args):
            rate = row.get("bytes", 0) / row["ms"] * 1e3
            speed = {"tb_per_s": rate / 1e12, "of_copy": rate / copy} if rate else {}
            rows.append({**common, **row, **speed})
            print(show(rows[-1]), flush=True)
    if args.csv:
        write_csv(args.csv, rows, COLUMNS)


if __name__ == "__main__":
    main()
