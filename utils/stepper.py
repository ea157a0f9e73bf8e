"""One optimizer step: gradients of some batches, precision, clipping, AdamW, schedule, average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from quadmamba.utils.distributed import World
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.weights import Parts, find_weights, load_weights

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_criterion(mixed: bool, label_smoothing: float) -> nn.Module:
    """Cross-entropy with class numbers, or with the targets of Mixup, which smooths them itself."""
    if mixed:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Autocast to bf16 or fp16 on a GPU; on a CPU, or with "off", everything stays float32."""
    on = device.type == "cuda" and amp in _DTYPES
    return torch.autocast(device.type, dtype=_DTYPES[amp] if on else None, enabled=on)


def backward_here() -> contextlib.AbstractContextManager[None]:
    """Within it, backward passes run on the calling thread, also for a GPU.

    PyTorch has a thread of its own for each GPU, which wakes for each pass; a host whose caches are
    cold for it needs up to twice as long for the same launches.
    """
    return torch.autograd.set_multithreading_enabled(False)


def with_synced_norms(model: nn.Module, world: World) -> nn.Module:
    """Batch norms that take their statistics over all ranks; PyTorch has them for GPUs only."""
    if not world.launched or world.device.type == "cpu":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class Stepper:
    """One optimizer step: the gradients of some batches, clipping, AdamW, schedule and average.

    A step whose loss or gradient is not finite is skipped, counted in `skipped` and, with those
    right before it, in `bad_in_row`. The gradients are summed over the ranks first, so a fault on
    one of them is seen by all and they skip together, and the decision stays on the device: the
    fused optimizer reads it there.

    accum: batches of a step. amp: "bf16", "fp16" (with loss scaling, which skips a few steps by
    design) or "off". clip: largest gradient norm, 0 for none. ema_decay: decay of the average of
    the weights, 0 for no average. sync_bn: batch norms, where the model has any, take their
    statistics over all ranks. compile_mode: one of torch.compile, or "off".
    `call` is the model as steps call it: compiled, exchanging gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        *,
        world: World,
        scheduler: Scheduler | None = None,
        amp: str = "off",
        clip: float = 0.0,
        ema_decay: float = 0.0,
        accum: int = 1,
        sync_bn: bool = False,
        compile_mode: str = "off",
    ) -> None:
        model = with_synced_norms(model, world) if sync_bn else model
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.world, self.scheduler, self.amp = world, scheduler, amp
        self.clip = clip or math.inf
        self.updates = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.bad_in_row = torch.zeros_like(self.skipped)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=world.device.type == "cuda" and amp == "fp16"
        )
        self.accum = accum
        self.net = self._connected()
        off = compile_mode == "off"
        self.call = self.net if off else torch.compile(self.net, mode=compile_mode)
        self.ema = ModelEmaV3(model, decay=ema_decay) if ema_decay else None

    def _connected(self) -> nn.Module:
        """The model with the weights of rank 0 as steps call it, which exchanges gradients."""
        if not self.world.launched:
            return self.model
        return DistributedDataParallel(
            self.model,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=self.accum == 1,  # it does not go with no_sync
        )

    def backward(self, images: Tensor, targets: Tensor, *, parts: int, last: bool) -> Tensor:
        """Add the gradient of one of `parts` batches; ranks exchange theirs with the last one.

        Returns the loss. Where it is not finite, no gradient is, so that all ranks see it.
        """
        wait: contextlib.AbstractContextManager = contextlib.nullcontext()
        if isinstance(self.net, DistributedDataParallel) and not last:
            wait = self.net.no_sync()
        with wait:
            with autocast(self.world.device, self.amp):
                loss = self.criterion(self.call(images), targets)
            one = 1 + loss.detach() - loss.detach()  # or NaN
            with backward_here():
                self.scaler.scale(one * loss / parts).backward()
        return loss.detach()

    def replay(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch on this rank alone, after its backward; takes no step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.world.device, self.amp):
            loss = self.criterion(self.model(images), targets)
        with backward_here():
            self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> Tensor:
        """Take the step; returns the norm of the gradient before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        bad = ~norm.isfinite()
        self.skipped += bad
        self.bad_in_row = (self.bad_in_row + 1) * bad
        if not self.scaler.is_enabled():
            # the fused kernel reads it, as where a scaler sets it
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        return norm

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps of it."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            "skipped": self.skipped,
            "bad_in_row": self.bad_in_row,
        }

    def load_state(self, state: Mapping, where: str) -> None:
        """Continue from `state`; rates, decays and other settings stay those of the configuration.

        Raises CheckpointError where weights or optimizer state do not fit.
        """
        weights = find_weights(state, Parts.of(self.model), where)
        load_weights(self.model, weights["model"].state, where)
        if self.ema is not None:
            load_weights(self.ema.module, weights.get("ema", weights["model"]).state, where)
        own = self.optimizer.state_dict()["param_groups"]
        saved = state["optimizer"]
        sizes = [[len(g["params"]) for g in groups] for groups in (own, saved["param_groups"])]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"{where}: expected optimizer groups of {sizes[0]} parameters, got {sizes[1]}; "
                "is TRAIN.DECAY_SSM the one it was trained with?"
            )
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.copy_(state["skipped"])
        self.bad_in_row.copy_(state["bad_in_row"])
        self.move_to(state["updates"])

    def move_to(self, updates: int) -> None:
        """Take the learning rate of the schedule after so many steps."""
        self.updates = updates
        if self.scheduler is not None:
            self.scheduler.step_update(updates)
