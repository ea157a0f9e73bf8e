"""Accuracy and loss, summed on the device and exact over ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy and accuracies in percent over `images` images."""

    loss: float
    top1: float
    top5: float
    images: int

    def as_dict(self) -> dict[str, float]:
        """Plain values by name, for logs and checkpoints."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.2f} %  top-5 {self.top5:.2f} %  "
            f"loss {self.loss:.4f}  images {self.images}"
        )


class Tally:
    """Sums over the images of a validation, on the device.

    totals: (4) float64 = loss, top-1 hits, top-5 hits, images.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch. logits: (b, classes), targets: (b) int64.

        With fewer than 5 classes top-5 takes them all.
        """
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (b, 5)
        hits = best == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").double().sum()
        counts = (hits[:, 0].sum(), hits.sum(), hits.new_tensor(len(hits), dtype=torch.int64))
        self.totals += torch.stack([loss, *(count.double() for count in counts)])


def metrics_of(totals: Tensor) -> Metrics:
    """Metrics of a Tally's totals, after they were summed over the ranks. Reads the device once."""
    loss, top1, top5, images = totals.tolist()
    count = max(images, 1.0)
    return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, int(images))
