"""Training steps whose forward and backward pass are one CUDA graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quadmamba.utils.distributed import DeviceError, World
from quadmamba.utils.graphs import GraphedBackward
from quadmamba.utils.stepper import Stepper


class GraphStepper(Stepper):
    """A `Stepper` that records the passes of a batch as a CUDA graph and replays them.

    Recorded for each shape of the batch on first use; clipping, optimizer, schedule and average
    stay outside. One process with a GPU: raises DeviceError for anything else.
    """

    def __init__(self, *parts: Any, world: World, **settings: Any) -> None:
        _check(world)
        super().__init__(*parts, world=world, **{**settings, "compile_mode": "off"})
        self._graphed: dict[int, GraphedBackward] = {}  # by the number of parts

    def backward(self, images: Tensor, targets: Tensor, *, parts: int, last: bool) -> Tensor:
        """Add the gradient of one of `parts` batches; returns the loss."""
        if parts not in self._graphed:

            def eager(images: Tensor, targets: Tensor) -> Tensor:
                return super(GraphStepper, self).backward(images, targets, parts=parts, last=last)

            self._graphed[parts] = GraphedBackward(eager, list(self.model.parameters()))
        return self._graphed[parts](images, targets)


def stepper_kind(compile_mode: str, world: World) -> type[Stepper]:
    """The class that takes the steps of TRAIN.COMPILE; all ranks stop where it cannot be."""
    if compile_mode != "graph":
        return Stepper
    with world.together(DeviceError):
        _check(world)
    return GraphStepper


def _check(world: World) -> None:
    if world.launched or world.device.type != "cuda":
        raise DeviceError(
            "TRAIN.COMPILE graph: expected one process with a GPU and no launcher, got "
            f"{world.size} on {world.device.type}{' from a launcher' * world.launched}; "
            "TRAIN.COMPILE off runs everywhere"
        )
