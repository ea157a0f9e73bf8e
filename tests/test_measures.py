"""Sizes, speeds, seeds and faults, beside the same numbers by hand."""

import random
import time

import numpy as np
import pytest
import torch
from test_engine import make_stepper
from torch import nn

from quadmamba.data import seeded
from quadmamba.data.canvases import Canvases, CanvasLoader
from quadmamba.models import QuadMamba
from quadmamba.utils import throughput
from quadmamba.utils.complexity import Complexity, report
from quadmamba.utils.distributed import World
from quadmamba.utils.hunt import first_not_finite
from quadmamba.utils.rng import rng_state, seed_step, set_rng_state

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------ complexity
def norm_macs(tokens, dim):
    return 5 * tokens * dim  # fvcore's count


def block_macs(tokens, c, *, ratio, n, mlp, quad):
    """Of a block in fvcore's convention; the scan by the official formula."""
    d, r, routes = int(c * ratio), -(-c // 16), 2 if quad else 4
    ends = 2 * tokens * c * d
    filters = 9 * tokens * d
    project = tokens * d * routes * (r + 2 * n)
    scan = routes * (9 * tokens * d * n + tokens * d + tokens * d * r)
    total = ends + filters + project + scan + norm_macs(tokens, d) + 2 * norm_macs(tokens, c)
    if quad:
        layers = d * d + d * (d // 2) + (d // 2) * (d // 4) + (d // 4) * 2
        total += tokens * layers + norm_macs(tokens, d)
    return total + 2 * tokens * c * int(c * mlp)


def test_each_part_is_counted_by_hand():
    """64x96 pixels would be another number: the image is square, 64x64."""
    model = QuadMamba(
        (16, 24, 32, 40),
        depths=(1, 2, 1, 1),
        orders=("quadtree", "raster", "window", "raster"),
        num_classes=7,
        ssm_ratio=1.5,
        d_state=2,
        mlp_ratio=2.5,
    )
    counted = report(model, 64)
    common = {"ratio": 1.5, "n": 2, "mlp": 2.5}
    macs = {
        "stem": 32**2 * 27 * 8 + norm_macs(32**2, 8) + 16**2 * 9 * 8 * 16 + norm_macs(16**2, 16),
        "stage 1": block_macs(16**2, 16, quad=True, **common),
        "stage 2": 2 * block_macs(8**2, 24, quad=False, **common),
        "stage 3": block_macs(4**2, 32, quad=False, **common),
        "stage 4": block_macs(2**2, 40, quad=False, **common),
        "head": norm_macs(2**2, 40) + 40 * 7,
    }
    for name, tokens, c, out in (("2", 64, 16, 24), ("3", 16, 24, 32), ("4", 4, 32, 40)):
        macs[f"stage {name}"] += 9 * tokens * c * out + norm_macs(tokens, out)
    found = {name: round(gmacs * 1e9) for name, (_, gmacs) in counted.parts.items()}
    assert found == macs
    assert round(counted.gmacs * 1e9) == sum(macs.values())
    homes = {"stem": ("stem.",), "head": ("head.",)}
    homes |= {f"stage {i + 1}": (f"stages.{i}.", f"downsamples.{i - 1}.") for i in range(4)}
    for name, prefixes in homes.items():
        params = [p.numel() for key, p in model.named_parameters() if key.startswith(prefixes)]
        assert counted.parts[name][0] == sum(params), name
    assert list(counted.parts) == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head"]


def test_the_table_of_sizes_line_by_line():
    parts = {"stem": (1_234_567, 0.25), "head": (1000, 1.0)}
    assert Complexity(1_235_567, 1.25, 96, parts).table().split("\n") == [
        "part       params (M)     GMACs",
        "stem            1.235     0.250",
        "head            0.001     1.000",
        "total           1.236     1.250",
        "one 96x96 image; fvcore + 9·b·l·d·n + b·d·l per scan",
    ]


# ------------------------------------------------------------------------------------ throughput
def test_speed_is_images_by_the_mean_time_of_a_step(monkeypatch):
    now, modes = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(nn.Linear):
        def forward(self, images):
            modes.append((self.training, torch.is_grad_enabled(), tuple(images.shape)))
            slow = len(modes) in (1, 2, 6, 7)  # the steps before those that are timed
            now[0] += 50.0 if slow else 4.0 if self.training else 0.5
            return super().forward(images.flatten(1)[:, :6])

    stepper = make_stepper(model=Slow(6, 3))
    before = stepper.model.weight.detach().clone()
    found = throughput.measure(stepper, batch=5, img_size=8, classes=3, warmup=2, steps=3)
    assert modes == [(False, False, (5, 3, 8, 8))] * 5 + [(True, True, (5, 3, 8, 8))] * 5
    assert (found.inference_img_s, found.training_img_s) == pytest.approx((10.0, 1.25))
    assert (found.inference_memory_gb, found.training_memory_gb) == (0.0, 0.0)
    assert stepper.updates == 5
    assert not torch.equal(stepper.model.weight, before)


def test_speeds_of_ranks_are_added(monkeypatch):
    monkeypatch.setattr(throughput, "timed", lambda *_: (0.5, 0.0))
    monkeypatch.setattr(World, "sum", lambda _, values: 3 * values)
    found = throughput.measure(make_stepper(), batch=4, img_size=8, classes=3, warmup=1, steps=1)
    assert (found.inference_img_s, found.training_img_s) == (24.0, 24.0)


# ----------------------------------------------------------------------------------------- seeds
def test_a_step_is_seeded_from_its_place_by_numpys_sequence():
    python, numpys, torchs = np.random.SeedSequence([3, 1, 4, 1]).generate_state(3).tolist()
    seed_step(3, 1, 4, 1)
    assert random.random() == random.Random(python).random()
    assert np.random.rand() == np.random.RandomState(numpys).rand()
    generator = torch.Generator().manual_seed(torchs)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=generator))
    assert rng_state(CPU)["cuda"] is None


def test_the_states_are_plain_values_that_a_checkpoint_can_hold(tmp_path):
    seed_step(0, 0, 0, 0)
    random.gauss(0, 1)
    np.random.randn()
    torch.save(rng_state(CPU), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert state["python"][1] == list(random.getstate()[1])
    assert state["python"][2] == random.getstate()[2] is not None
    assert state["numpy"][1].dtype == torch.int64
    assert state["numpy"][1].tolist() == np.random.get_state()[1].tolist()
    assert state["numpy"][3] == 1


def test_the_generator_of_a_gpu_is_kept_for_gpus(monkeypatch):
    gpu, given = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: [device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: given.append(args))
    state = rng_state(gpu)
    assert state["cuda"] == [gpu]
    set_rng_state(state, CPU)
    set_rng_state(rng_state(CPU), gpu)
    assert given == []
    set_rng_state(state, gpu)
    assert given == [([gpu], gpu)]


def test_a_sample_is_seeded_from_its_keys_by_numpys_sequence():
    sequence = np.random.SeedSequence([5, 2**64 - 1, 0])
    python, torchs = sequence.generate_state(2).tolist()
    with seeded(5, -1, 2**64):
        assert random.random() == random.Random(python).random()
        drawn = torch.rand(3)
        assert np.random.rand() == np.random.RandomState(np.random.PCG64(sequence)).rand()
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(torchs)))


# -------------------------------------------------------------------------------------- canvases
def test_canvases_move_by_what_seed_and_epoch_draw():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (7, 28, 28), generator=rng, dtype=torch.uint8)
    loader = CanvasLoader(
        Canvases(images, torch.arange(7), torch.zeros(7, 2)), 3, shuffle=True, seed=2
    )
    loader.set_epoch(5)
    found = list(loader)
    generator = torch.Generator().manual_seed(2 * 2**20 + 5)
    order = torch.randperm(7, generator=generator)
    moves = torch.randint(5, (7, 2), generator=generator)  # 28 / 14 = 2 pixels to each side
    assert torch.cat([targets for _, targets in found]).tolist() == order[:6].tolist()
    for image, number, (y, x) in zip(torch.cat([part for part, _ in found]), order, moves):
        canvas = torch.zeros(32, 32)
        canvas[2:30, 2:30] = images[number]
        seen = canvas[y : y + 28, x : x + 28] / 255
        for channel, mean, std in zip(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)):
            torch.testing.assert_close(channel, (seen - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shuffle", "length"), [(True, 2), (False, 3)])
def test_a_pass_that_begins_later_is_shorter(shuffle, length):
    canvases = Canvases(torch.zeros(10, 14, 14).byte(), torch.arange(10), torch.zeros(10, 2))
    loader = CanvasLoader(canvases, 3, shuffle=shuffle)
    assert loader.margin == (1 if shuffle else 0)
    whole = [t.tolist() for _, t in loader]
    loader.set_epoch(0, 3)
    assert len(loader) == length
    rest = [t.tolist() for _, t in loader]
    assert rest == whole[1:]
    moved = canvases.to(torch.device("meta"))
    assert {t.device.type for t in (moved.images, moved.targets, moved.centres)} == {"meta"}


# ------------------------------------------------------------------------------------------ hunt
class Parts(nn.Module):
    """Its layer gives a nested output, of which the last part is spoiled."""

    def __init__(self, fault):
        super().__init__()
        self.layer, self.fault = nn.Linear(2, 2), fault

    def forward(self, x):
        y = self.layer(x)
        return y, [y, (2 * y, y / 0 if self.fault else y)]


@pytest.mark.parametrize(
    ("fault", "found"), [(True, "output of module the whole model (Parts)"), (False, "")]
)
def test_nested_outputs_are_looked_at(fault, found):
    model = Parts(fault)

    def replay():
        loss = model(torch.ones(1, 2))[1][1][0].sum()
        loss.backward()
        return loss.detach()

    assert first_not_finite(model, replay) == found
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_and_a_gradient_of_a_parameter_are_named():
    model = nn.Linear(2, 2)
    assert (
        first_not_finite(model, lambda: model(torch.ones(1, 2)).sum() / 0)
        == "loss, of finite outputs"
    )

    def replay():
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        model.bias.grad.fill_(torch.nan)
        return loss

    assert first_not_finite(model, replay) == "gradient of parameter bias"
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(torch.inf)
    assert first_not_finite(model, replay) == "parameter weight (2 parameters in all)"
