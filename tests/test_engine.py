"""One optimizer step, metrics, logs and what ranks agree on."""

import math

import pytest
import torch
from runs import two_ranks
from torch import nn

from quadmamba.utils.distributed import RankError, World
from quadmamba.utils.hunt import first_not_finite
from quadmamba.utils.stepper import Stepper, build_criterion, with_synced_norms


def make_stepper(world=None, lr=0.1, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    criterion = build_criterion(mixed=False, label_smoothing=0.1)
    return Stepper(model, optimizer, criterion, world=world or World(), **options)


def batch(size, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=rng), torch.randint(3, (size,), generator=rng)


def gradients(stepper):
    return [param.grad.clone() for param in stepper.model.parameters()]


def weights(stepper):
    return [param.detach().clone() for param in stepper.model.parameters()]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = make_stepper(), make_stepper()
    images, targets = batch(12)
    loss = whole.backward(images, targets, parts=1, last=True)
    losses = [
        parts.backward(images[i : i + 4], targets[i : i + 4], parts=3, last=i == 8)
        for i in (0, 4, 8)
    ]
    assert torch.stack(losses).mean() == pytest.approx(loss.item(), rel=1e-6)
    for a, b in zip(gradients(whole), gradients(parts)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_and_the_norm_before_is_returned():
    stepper = make_stepper(clip=1e-3)
    stepper.backward(*batch(4), parts=1, last=True)
    grads = gradients(stepper)
    norm = stepper.update()
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item())
    moments = stepper.optimizer.state.values()
    clipped = torch.cat([state["exp_avg"].flatten() / 0.1 for state in moments]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["backward", "replay"])
def test_gradients_are_found_on_the_calling_thread(name):
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            y.register_hook(lambda _: seen.append(torch._C._is_multithreading_enabled()))
            return y

    stepper = make_stepper(model=Watched(6, 3))
    kwargs = {"parts": 1, "last": True} if name == "backward" else {}
    getattr(stepper, name)(*batch(4), **kwargs)
    assert seen == [False]
    assert torch._C._is_multithreading_enabled()


def test_a_step_that_is_not_finite_is_skipped_and_the_next_one_counts():
    stepper, other = make_stepper(), make_stepper()
    images, targets = batch(4)
    before = weights(stepper)
    stepper.backward(images * math.nan, targets, parts=1, last=True)
    stepper.update()
    assert all(map(torch.equal, weights(stepper), before))
    assert (stepper.skipped.item(), stepper.updates) == (1, 1)
    for each in (stepper, other):
        each.backward(images, targets, parts=1, last=True)
        each.update()
    assert all(map(torch.equal, weights(stepper), weights(other)))
    assert not torch.equal(weights(stepper)[0], before[0])
    assert stepper.skipped.item() == 1


def test_a_loss_that_is_not_finite_spoils_its_gradient():
    class Infinite(nn.CrossEntropyLoss):
        def forward(self, logits, targets):
            return super().forward(logits, targets) + math.inf  # with a finite gradient

    stepper = make_stepper()
    stepper.criterion = Infinite()
    before = weights(stepper)
    for count in (1, 2):
        stepper.backward(*batch(4), parts=1, last=True)
        stepper.update()
        assert (stepper.skipped.item(), stepper.bad_in_row.item()) == (count, count)
    assert all(map(torch.equal, weights(stepper), before))
    stepper.criterion = nn.CrossEntropyLoss()
    stepper.backward(*batch(4), parts=1, last=True)
    stepper.update()
    assert (stepper.skipped.item(), stepper.bad_in_row.item()) == (2, 0)


def test_batch_norms_are_synced_over_the_ranks_of_gpus():
    def kind(**world):
        net = with_synced_norms(nn.Sequential(nn.BatchNorm2d(3)), World(**world))
        return type(net[0])

    assert kind(launched=True, device=torch.device("cuda", 0)) is nn.SyncBatchNorm
    assert kind(launched=True) is kind(device=torch.device("cuda", 0)) is nn.BatchNorm2d


def test_the_compiled_model_takes_the_step(monkeypatch):
    modes = []

    def compiled(net, mode):
        modes.append(mode)
        return lambda images: net(images) * 0

    monkeypatch.setattr(torch, "compile", compiled)
    loss = make_stepper(compile_mode="reduce-overhead").backward(*batch(4), parts=1, last=True)
    assert modes == ["reduce-overhead"]
    assert loss.item() == pytest.approx(math.log(3))


class Broken(nn.Sequential):
    """Its second layer can give NaN, or a gradient that is not finite."""

    def __init__(self, fault):
        super().__init__(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
        self.fault = fault
        if fault == "parameter":
            nn.init.constant_(self[2].bias, math.inf)

    def forward(self, x):
        x = self[1](self[0](x))
        if self.fault == "gradient":
            x = x + (0 * x).sqrt().detach() + (0 * x).sqrt()
        return self[2](x)


def test_the_place_where_numbers_stop_being_finite_is_named():
    stepper = make_stepper(model=nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)))
    images, targets = batch(4)

    def find(stepper, images=images):
        return first_not_finite(stepper.model, lambda: stepper.replay(images, targets))

    assert find(stepper) == ""
    assert find(stepper, images * math.nan) == "output of module 0 (Linear)"
    handle = stepper.model[1].register_forward_hook(lambda *args: args[2] / 0)
    assert find(stepper) == "output of module 1 (GELU)"
    handle.remove()
    assert find(stepper) == ""
    assert find(make_stepper(model=Broken("gradient"))) == (
        "gradient of the output of module 1 (GELU)"
    )
    assert "parameter 2.bias" in find(make_stepper(model=Broken("parameter")))


def test_average_follows_its_own_step_after_loading():
    stepper, other = make_stepper(ema_decay=0.5), make_stepper(ema_decay=0.5)
    for each in (stepper, other):
        for i in range(4):
            if each is other and i == 2:
                each = make_stepper(ema_decay=0.5)
                each.load_state(other.state(), "here")
                other = each
            each.backward(*batch(4, seed=i), parts=1, last=True)
            each.update()
    assert other.updates == 4
    for a, b in zip(stepper.ema.module.parameters(), other.ema.module.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(stepper.ema.module[0].weight, stepper.model[0].weight)


def test_settings_of_the_configuration_win_over_those_of_a_checkpoint():
    old, new = make_stepper(lr=0.1), make_stepper(lr=0.2)
    old.backward(*batch(4), parts=1, last=True)
    old.update()
    new.load_state(old.state(), "here")
    assert new.optimizer.param_groups[0]["lr"] == 0.2
    assert new.updates == 1


@pytest.mark.parametrize("saved", ["none", "another"])
def test_an_average_goes_on_from_the_file_s_or_begins_with_its_weights(saved):
    old, new = make_stepper(), make_stepper(ema_decay=0.5)
    old.backward(*batch(4), parts=1, last=True)
    old.update()
    state = old.state()
    assert state["ema"] is None
    if saved == "another":
        state["ema"] = {key: value + 1 for key, value in state["model"].items()}
    new.load_state(state, "here")
    wanted = {key: value + (saved == "another") for key, value in old.model.state_dict().items()}
    assert all(torch.equal(v, wanted[k]) for k, v in new.ema.module.state_dict().items())
    assert not torch.equal(make_stepper().model[0].weight, old.model[0].weight), "a step was taken"


def test_counters_of_steps_go_on_where_they_were():
    old, new = make_stepper(), make_stepper()
    state = old.state() | {"skipped": torch.tensor(5), "bad_in_row": torch.tensor(3), "updates": 9}
    new.load_state(state, "here")
    assert (new.skipped.item(), new.bad_in_row.item(), new.updates) == (5, 3, 9)
    assert (new.skipped.dtype, new.bad_in_row.dtype) == (torch.int64, torch.int64)


def test_M2_wrapped_names_are_those_of_the_model_in_a_run_too():
    old, new = make_stepper(), make_stepper(ema_decay=0.5)
    old.backward(*batch(4), parts=1, last=True)
    old.update()
    state = old.state()
    state["model"] = {f"_orig_mod.module.{key}": value for key, value in state["model"].items()}
    new.load_state(state, "here")
    assert torch.equal(new.model[0].weight, old.model[0].weight)
    assert torch.equal(new.ema.module[0].weight, old.model[0].weight)


def test_mixed_targets_need_the_soft_criterion():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    soft = nn.functional.one_hot(targets, 3).float()
    torch.testing.assert_close(
        build_criterion(mixed=True, label_smoothing=0.1)(logits, soft),
        build_criterion(mixed=False, label_smoothing=0.0)(logits, targets),
    )


def test_errors_of_one_process_reach_it_as_the_cause():
    with pytest.raises(RankError) as caught, World().together(ValueError):
        raise ValueError("expected this")
    assert str(caught.value.__cause__) == "expected this"
    with pytest.raises(KeyError), World().together(ValueError):
        raise KeyError("another")


TWO_RANKS = """
import sys
import torch
sys.path.insert(0, "tests")
from quadmamba.models import QuadMamba
from quadmamba.utils.distributed import RankError, join
from quadmamba.utils.launch import place_from_env
from test_engine import batch, gradients, make_stepper, weights

images, targets = batch(16)
with join(place_from_env(), torch.device("cpu"), (), timeout=60) as world:
    mine = slice(8 * world.rank, 8 * world.rank + 8)
    whole, half, parts = make_stepper(), make_stepper(world), make_stepper(world, accum=2)
    whole.backward(images, targets, parts=1, last=True)
    half.backward(images[mine], targets[mine], parts=1, last=True)
    for i in (0, 4):
        part = slice(8 * world.rank + i, 8 * world.rank + i + 4)
        parts.backward(images[part], targets[part], parts=2, last=i == 4)
    for stepper in (half, parts):
        for a, b in zip(gradients(whole), gradients(stepper)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    half.optimizer.zero_grad()
    before = weights(half)
    spoiled = images[mine] * (torch.nan if world.rank else 1.0)
    half.backward(spoiled, targets[mine], parts=1, last=True)
    half.update()
    assert all(map(torch.equal, weights(half), before))
    assert half.skipped.item() == 1
    try:
        with world.together(ValueError):
            if world.rank == 1:
                raise ValueError("on one rank")
    except RankError as error:
        assert str(error) == "rank 1 failed"
        assert (error.__cause__ is None) == (world.rank == 0)
    assert world.gather(world.rank) == [0, 1]
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for part, share in ((slice(16), None), (mine, world)):
        model = QuadMamba([8] * 4, depths=[1] * 4, orders=["raster"] * 4, num_classes=3)
        torch.manual_seed(0)
        model.load_state_dict(found[0] if found else model.state_dict())
        found = found or [{key: v.clone() for key, v in model.state_dict().items()}]
        stepper = make_stepper(share, model=model.to(memory_format=torch.channels_last))
        stepper.backward(pixels[part], targets[part], parts=1, last=True)
        found.append(gradients(stepper))
    assert max(grad.abs().max() for grad in found[1]) > 1e-3
    for a, b in zip(*found[1:]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = QuadMamba([8] * 4, depths=[2, 1, 1, 1], num_classes=3, use_checkpoint=again)
        model = model.to(memory_format=torch.channels_last)
        stepper = make_stepper(world, model=model)
        for step in range(2):  # a static graph changes its ways after the first one
            torch.manual_seed(step)
            stepper.optimizer.zero_grad()
            stepper.backward(torch.randn(2, 3, 32, 32), targets[:2], parts=1, last=True)
        found.append(gradients(stepper))
    assert all(map(torch.equal, *found))
    print("agreed", flush=True)
"""


def test_two_ranks_agree_on_gradients_skips_and_errors():
    for code, out, err in two_ranks(["-c", TWO_RANKS]):
        assert code == 0, err
        assert "agreed" in out
