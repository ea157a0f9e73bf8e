"""Training steps whose forward and backward pass are one CUDA graph."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from quadmamba.utils.distributed import World
from quadmamba.utils.exchange import GradientMean, share_weights
from quadmamba.utils.graphs import GraphedBackward
from quadmamba.utils.launch import DeviceError
from quadmamba.utils.stepper import Stepper


class GraphStepper(Stepper):
    """A `Stepper` that records the passes of a batch as a CUDA graph and replays them.

    Recorded for each shape of the batch on first use; clipping, optimizer, schedule and average
    stay outside, and so does what ranks exchange: they start from the weights of rank 0, each
    records the bare model, and the gradients are averaged after the last part of a step.
    Raises DeviceError where there is no GPU.
    """

    def __init__(self, *parts: Any, world: World, **settings: Any) -> None:
        _check(world)
        super().__init__(*parts, world=world, **{**settings, "compile_mode": "off"})
        self._graphed: dict[int, GraphedBackward] = {}  # by the number of parts
        self._average = GradientMean(self.model.parameters(), world)

    def backward(self, images: Tensor, targets: Tensor, *, parts: int, last: bool) -> Tensor:
        """Add the gradient of one of `parts` batches; ranks exchange theirs after the last one."""
        if parts not in self._graphed:
            eager = partial(super().backward, parts=parts, last=last)
            self._graphed[parts] = GraphedBackward(eager, list(self.model.parameters()))
        loss = self._graphed[parts](images, targets)
        if last:
            self._average()
        return loss

    def _connected(self) -> nn.Module:
        """The bare model, with the weights of rank 0.

        All ranks stop where its batch norms would exchange statistics, which no graph can hold.
        """
        if self.world.size > 1:
            with self.world.together(DeviceError):
                if any(isinstance(m, nn.SyncBatchNorm) for m in self.model.modules()):
                    raise DeviceError(
                        "TRAIN.SYNC_BN: expected False with TRAIN.COMPILE graph on several ranks, "
                        "got a model whose batch norms take statistics over all of them; "
                        "TRAIN.COMPILE off can do that"
                    )
        share_weights(self.model, self.world)
        return self.model


def stepper_kind(compile_mode: str, world: World) -> type[Stepper]:
    """The class that takes the steps of TRAIN.COMPILE; all ranks stop where it cannot be."""
    if compile_mode != "graph":
        return Stepper
    with world.together(DeviceError):
        _check(world)
    return GraphStepper


def _check(world: World) -> None:
    if world.device.type != "cuda":
        raise DeviceError(
            f"TRAIN.COMPILE graph: expected a GPU for each process, got {world.size} on "
            f"{world.device.type}; TRAIN.COMPILE off runs everywhere"
        )
