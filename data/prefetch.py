"""The last steps of a batch, taken on the device: bytes to normalised floats, random erasing.

A batch crosses to a GPU as bytes, on a stream of its own, while the batch before it is computed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from quadmamba.data.datasets import Batch
from quadmamba.data.erasing import erase


def normalise(images: Tensor) -> Tensor:
    """Bytes (b, h, w, 3) to (b, 3, h, w) with ImageNet's mean and deviation, channels last."""
    b, h, w, c = images.shape
    scale, shift = _row_constants(w, images.device)
    rows = images.view(b * h, w * c).float().mul_(scale).add_(shift)
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)


@cache  # making them waits for the GPU
def _row_constants(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand for a row of pixels; an innermost loop over three channels is slow."""
    deviation = torch.tensor(IMAGENET_DEFAULT_STD, dtype=torch.float64)
    scale = 1 / (255 * deviation)
    shift = -torch.tensor(IMAGENET_DEFAULT_MEAN, dtype=torch.float64) / deviation
    return scale.float().repeat(width).to(device), shift.float().repeat(width).to(device)


class Prefetcher:
    """Makes batches ready on `device`, on a GPU one batch ahead on a stream of its own.

    remode: the fill of erased areas, as AUG.REMODE. Batches without images are not expected. What
    comes out is normalised images (b, 3, h, w) and targets (b,), to be used on the stream that is
    current when they are taken.
    """

    def __init__(self, device: torch.device, remode: str) -> None:
        self.device = device
        self.remode = remode
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        if self.stream is None:
            yield from map(self._finish, batches)
            return
        waiting = None
        for batch in batches:
            with torch.cuda.stream(self.stream):
                coming = (*self._finish(batch), self.stream.record_event())
            if waiting is not None:
                yield self._hand_over(*waiting)
            waiting = coming
        if waiting is not None:
            yield self._hand_over(*waiting)

    def wait(self) -> None:
        """Wait until the batches that were taken so far are read no more."""
        if self.stream is not None:
            self.stream.synchronize()

    def _finish(self, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch.targets.to(self.device, non_blocking=True)
        images = normalise(batch.images.to(self.device, non_blocking=True))
        return erase(images, batch.holes, self.remode), targets

    def _hand_over(
        self, images: Tensor, targets: Tensor, done: torch.cuda.Event
    ) -> tuple[Tensor, Tensor]:
        """Let the consumer's stream wait for the batch, and its memory wait for the consumer."""
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(done)
        for tensor in (images, targets):
            tensor.record_stream(consumer)
        return images, targets
