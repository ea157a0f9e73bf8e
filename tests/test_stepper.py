"""A step beside the same step by hand: its order, its loss scaling, its schedule."""

import contextlib
import math

import pytest
import torch
from test_engine import batch, gradients, make_stepper, weights
from timm.scheduler import CosineLRScheduler
from torch import nn

from quadmamba.utils import stepper as module
from quadmamba.utils.distributed import World
from quadmamba.utils.stepper import Stepper


class Scaler:
    """In the place of a GradScaler: scales by 1024 and writes down what is asked of it."""

    def __init__(self, stepper):
        self.stepper, self.calls = stepper, []

    def scale(self, loss):
        self.calls.append("scale")
        return 1024 * loss

    def unscale_(self, optimizer):
        assert optimizer is self.stepper.optimizer
        self.calls.append("unscale")
        for param in self.stepper.model.parameters():
            param.grad.div_(1024)

    def step(self, optimizer):
        self.calls.append("step")
        self.norm = torch.cat([g.flatten() for g in gradients(self.stepper)]).norm().item()
        optimizer.step()

    def update(self):
        self.calls.append("update")

    def is_enabled(self):
        return True

    def state_dict(self):
        return {"scale": 512.0}

    def load_state_dict(self, state):
        self.calls.append(state)


def test_gradients_are_unscaled_then_clipped_then_taken():
    scaled, plain = make_stepper(clip=1e-2), make_stepper(clip=1e-2)
    scaled.scaler = scaler = Scaler(scaled)
    norms = []
    for stepper in (scaled, plain):
        stepper.backward(*batch(4), parts=1, last=True)
        norms.append(stepper.update().item())
    assert scaler.calls == ["scale", "unscale", "step", "update"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 0.1, "before clipping"
    assert scaler.norm == pytest.approx(1e-2, rel=1e-3), "after clipping"
    for a, b in zip(weights(scaled), weights(plain)):
        torch.testing.assert_close(a, b)
    assert not hasattr(scaled.optimizer, "found_inf"), "the scaler's own"
    assert plain.optimizer.found_inf.item() == 0


def test_the_loss_scale_goes_on_where_the_checkpoint_has_one():
    saving, empty = make_stepper(), make_stepper()
    for each in (saving, empty):
        each.backward(*batch(4), parts=1, last=True)
        each.update()
    saving.scaler = Scaler(saving)
    for source, enabled in ((saving, True), (saving, False), (empty, True)):
        stepper = make_stepper()
        scaler = Scaler(stepper)
        stepper.scaler = scaler if enabled else stepper.scaler
        stepper.load_state(source.state(), "here")
        assert scaler.calls == ([{"scale": 512.0}] if enabled and source is saving else [])


def test_only_half_precision_on_a_gpu_is_scaled():
    for amp in ("fp16", "bf16", "off"):
        assert not make_stepper(amp=amp).scaler.is_enabled(), "on a CPU"
    gpu = World(device=torch.device("cuda"))
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *args, **_: torch.empty(*args))
        patch.setattr(torch.amp, "GradScaler", lambda kind, enabled: made.append((kind, enabled)))
        for amp in ("fp16", "bf16", "off"):
            make_stepper(gpu, amp=amp)
    assert made == [("cuda", True), ("cuda", False), ("cuda", False)]


def test_no_clipping_leaves_any_gradient():
    stepper = make_stepper(clip=0.0)
    images, targets = batch(4)
    stepper.backward(1e4 * images, targets, parts=1, last=True)
    grads = gradients(stepper)
    norm = stepper.update()
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item())
    assert norm > 100
    states = stepper.optimizer.state.values()
    for state, grad in zip(states, grads):
        torch.testing.assert_close(state["exp_avg"], 0.1 * grad)


def test_the_rate_of_a_step_is_that_of_the_schedule_before_it():
    def rate(stepper):
        return stepper.optimizer.param_groups[0]["lr"]

    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    schedule = CosineLRScheduler(optimizer, t_initial=4, t_in_epochs=False)
    stepper = Stepper(model, optimizer, nn.CrossEntropyLoss(), world=World(), scheduler=schedule)
    cosine = [0.1 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    for update in range(3):
        assert rate(stepper) == pytest.approx(cosine[update])
        stepper.backward(*batch(4), parts=1, last=True)
        stepper.update()
        assert stepper.updates == update + 1
        assert all(param.grad is None for param in model.parameters())
    stepper.move_to(1)
    assert (stepper.updates, rate(stepper)) == (1, pytest.approx(cosine[1]))
    without = make_stepper()
    without.move_to(7)
    assert without.updates == 7


def test_a_replay_gives_the_loss_and_the_gradients_of_this_batch_alone():
    stepper, other = make_stepper(accum=3), make_stepper()
    stepper.model.eval()
    stepper.backward(*batch(4, seed=1), parts=3, last=False)
    loss = stepper.replay(*batch(4))
    expected = other.backward(*batch(4), parts=1, last=True)
    assert loss.item() == expected.item()
    assert not loss.requires_grad
    assert stepper.model.training
    assert all(map(torch.equal, gradients(stepper), gradients(other)))


def test_bad_steps_are_counted_in_a_row_and_in_all():
    stepper = make_stepper()
    images, targets = batch(4)
    counts = []
    for bad in (True, True, False, True):
        stepper.backward(images * (math.nan if bad else 1.0), targets, parts=1, last=True)
        stepper.update()
        counts.append((stepper.skipped.item(), stepper.bad_in_row.item()))
    assert counts == [(1, 1), (2, 2), (2, 0), (3, 1)]
    state = stepper.state()
    assert (state["skipped"].item(), state["bad_in_row"].item(), state["updates"]) == (3, 1, 4)
    assert state["ema"] is None
    assert state["model"].keys() == stepper.model.state_dict().keys()


class Exchange(nn.Module):
    """In the place of DistributedDataParallel: writes down its settings and where it waits."""

    made: list[tuple[nn.Module, dict[str, object]]] = []

    def __init__(self, module, **settings):
        super().__init__()
        self.module, self.waits = module, []
        Exchange.made.append((module, settings))

    @contextlib.contextmanager
    def no_sync(self):
        self.waits.append("in")
        yield
        self.waits.append("out")

    def forward(self, images):
        self.waits.append("forward")
        return self.module(images)


@pytest.mark.parametrize(("accum", "kind"), [(1, "cpu"), (3, "cpu"), (1, "cuda")])
def test_ranks_exchange_gradients_with_the_last_part_alone(accum, kind, monkeypatch):
    monkeypatch.setattr(module, "DistributedDataParallel", Exchange)
    monkeypatch.setattr(torch, "zeros", lambda *args, **_: torch.empty(*args))
    Exchange.made.clear()
    world = World(launched=True, size=2, device=torch.device(kind))
    found = make_stepper(world, accum=accum)
    assert found.net.module is found.model
    assert found.call is found.net
    settings = {
        "device_ids": [world.device] if kind == "cuda" else None,
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
        "static_graph": accum == 1,
    }
    assert Exchange.made == [(found.model, settings)]
    found.world = World()
    for last in (False, True):
        found.backward(*batch(4), parts=2, last=last)
    assert found.net.waits == ["in", "forward", "out", "forward"]


def test_a_process_alone_exchanges_nothing():
    found = make_stepper()
    assert found.net is found.call is found.model
