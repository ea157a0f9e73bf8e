"""Speed of a model on random images that lie on the device already."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quadmamba.utils.graph_stepper import GraphStepper
from quadmamba.utils.graphs import GraphedCall
from quadmamba.utils.stepper import Stepper, autocast


@dataclass(frozen=True)
class Throughput:
    """Images per second over all ranks, and peak GPU memory of one in 10^9 bytes (0 on a CPU)."""

    inference_img_s: float
    training_img_s: float
    inference_memory_gb: float
    training_memory_gb: float


def measure(
    stepper: Stepper, *, batch: int, img_size: int, classes: int, warmup: int, steps: int
) -> Throughput:
    """Time inference without gradients, then training steps with all that a step of a run has.

    batch: images per rank. The mean of `steps` steps after `warmup` steps, with one wait for the
    device at the end. The forward pass of a `GraphStepper` is a CUDA graph in inference too.
    """
    world = stepper.world
    images = torch.randn(batch, 3, img_size, img_size, device=world.device)
    targets = torch.randint(classes, (batch,), device=world.device)

    @torch.no_grad()
    def infer(images: Tensor) -> Tensor:
        with autocast(world.device, stepper.amp):
            return stepper.call(images)

    def step() -> None:
        stepper.backward(images, targets, parts=1, last=True)
        stepper.update()

    stepper.net.eval()
    call = partial(GraphedCall(infer) if isinstance(stepper, GraphStepper) else infer, images)
    inference, inference_memory = timed(call, world.device, warmup, steps)
    del call  # and the memory of a graph
    stepper.net.train()
    training, training_memory = timed(step, world.device, warmup, steps)
    rates = torch.tensor([batch / inference, batch / training], dtype=torch.float64)
    inference_rate, training_rate = world.sum(rates.to(world.device)).tolist()
    return Throughput(inference_rate, training_rate, inference_memory, training_memory)


def timed(
    call: Callable[[], object], device: torch.device, warmup: int, steps: int
) -> tuple[float, float]:
    """Seconds of one call, the mean of `steps` after `warmup`; the peak memory in 10^9 bytes."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warmup):
        call()
    _wait(on_gpu)
    start = time.perf_counter()
    for _ in range(steps):
        call()
    _wait(on_gpu)
    seconds = (time.perf_counter() - start) / steps
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
