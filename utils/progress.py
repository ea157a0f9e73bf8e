"""How far a run is, what it says between two points, and what the ranks agree on at each step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quadmamba.utils.distributed import World
from quadmamba.utils.metrics import Metrics


@dataclass
class Progress:
    """How far a run is.

    epoch: epochs completed and validated. step, images: of the epoch after these, the batches that
    each rank took and the images that all ranks took together. metrics, best: of the last and the
    best validation, with the keys of utils.checkpoint.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    best: dict[str, object] = field(default_factory=dict)

    def judge(self, metrics: Mapping[str, Metrics]) -> bool:
        """Take a validation; True where its top-1 is the best so far. A tie goes to the average."""
        self.metrics = {name: result.as_dict() for name, result in metrics.items()}
        name = max(metrics, key=lambda key: (metrics[key].top1, key == "ema"))
        better = not self.best or metrics[name].top1 > self.best["top1"]
        if better:
            self.best = {"top1": metrics[name].top1, "epoch": self.epoch + 1, "weights": name}
        return better

    def next_epoch(self) -> None:
        """Go to the first batch of the next epoch."""
        self.epoch, self.step, self.images = self.epoch + 1, 0, 0


class Window:
    """Sums between two log lines, on the device until `read`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.norm = torch.zeros((), device=world.device)
        self._start()

    def _start(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        self._batches, self._clock = 0, time.perf_counter()
        self._timed = 0  # batches since the clock was set

    def add(self, loss: Tensor, images: int) -> None:
        """Count a batch of this rank."""
        self._sums[0] += loss
        self._sums[1] += images
        self._batches += 1
        self._timed += 1

    def state(self) -> list[object]:
        """What a checkpoint keeps of this rank."""
        return [self._sums.cpu(), self._batches]

    def load_state(self, state: list) -> None:
        """Continue from `state`; the clock starts anew."""
        self._sums.copy_(state[0])
        self._batches = state[1]

    def read(self) -> dict[str, float]:
        """Means over the window and all ranks; waits for the device. Starts another window."""
        loss, images = self._world.sum(self._sums).tolist()
        seconds = time.perf_counter() - self._clock
        values = {
            "loss": loss / self._batches / self._world.size,
            "grad_norm": float(self.norm),
            "images_per_s": images * self._timed / self._batches / seconds,
            "seconds_per_step": seconds / self._timed,
        }
        self._start()
        return values


class Agreement:
    """What the ranks tell one another at each optimizer step.

    On a GPU the answer comes one step later, so that nobody waits for the device.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: tuple[Tensor, torch.cuda.Event] | None = None
        self._done = False  # the answer that is under way asks for a save that is done

    def saved(self) -> None:
        """Note on all ranks that they saved: a wish that is under way is from before."""
        self._done = True

    def ask(self, stop: bool, save: bool, bad_in_row: Tensor) -> tuple[bool, bool, int]:
        """Whether any rank wants to stop, and to save; and `bad_in_row`, alike on all ranks."""
        device = self._world.device
        wishes = torch.tensor([stop, save], dtype=torch.int64).to(device, non_blocking=True)
        answer = torch.cat([self._world.sum(wishes), bad_in_row[None]])
        if device.type == "cuda":
            before, self._waiting = self._waiting, self._send(answer)
            if before is None:
                return False, False, 0
            before[1].synchronize()
            answer = before[0]
        else:
            self._done = False
        stops, saves, bad = answer.tolist()
        done, self._done = self._done, False
        return stops > 0, saves > 0 and not done, bad

    @staticmethod
    def _send(answer: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        host = torch.empty_like(answer, device="cpu", pin_memory=True)
        host.copy_(answer, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event
