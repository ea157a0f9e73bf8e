"""Steps by graph on several ranks are those of DistributedDataParallel.

On a CPU the same steps run without the recording.
"""

import copy
import hashlib
import os
from dataclasses import replace

import pytest
import torch
from runs import arguments, finish, free_port, start, write_images
from test_graphs import needs_gpu, stepper_of
from torch import nn

from quadmamba.models import QuadMamba
from quadmamba.utils import graph_stepper
from quadmamba.utils.distributed import RankError, join
from quadmamba.utils.graph_stepper import GraphStepper
from quadmamba.utils.launch import place_from_env
from quadmamba.utils.stepper import Stepper

TOLERANCES = {"cpu": (1e-5, 1e-5), "cuda": (1e-2, 5e-2)}  # relative: loss and gradient norm
RANKS = """
import sys
sys.path.insert(0, "tests")
from quadmamba.utils.launch import run_and_leave
from test_graph_ranks import check

def program():
    check(sys.argv[1])
    print("agreed")
    return 0

run_and_leave(program)
"""


class Unrecorded:
    """In the place of a GraphedBackward: a call as it is."""

    def __init__(self, call, params):
        assert len(params)
        self.call = call

    def __call__(self, *inputs):
        return self.call(*inputs)


def check(where):
    """What each rank does; where: "cpu", "shared" (one GPU for all, gloo) or "nccl"."""
    world = place_from_env()
    gpu = torch.device("cuda", world.local_rank if where == "nccl" else 0)
    with join(world, gpu if where == "nccl" else torch.device("cpu"), (), timeout=300) as world:
        if where == "cpu":
            graph_stepper.GraphedBackward = Unrecorded
            graph_stepper._check = lambda _: None
        else:
            world = replace(world, device=gpu)
        for parts in (1, 2):
            check_steps(world, parts)
        if world.size > 1:
            check_batch_norms(world)


def check_steps(world, parts):
    """Losses, norms, skips and weights; one rank is spoiled in one of the steps."""
    kinds = (Stepper, GraphStepper)
    pair = [stepper_of(kind, tiny(world), world, clip=1.0, accum=parts) for kind in kinds]
    before = [param.detach().clone() for param in pair[0].model.parameters()]
    assert all(map(torch.equal, before, pair[1].model.parameters()))
    assert digests(pair[1], world) == [digests(pair[0], world)[0]] * world.size
    for step in range(5):
        skipped = pair[1].skipped.item()
        compare_step(pair, step, parts, spoiled=step == 2)
        assert pair[1].skipped == pair[0].skipped >= skipped + (step == 2)
    assert len(set(digests(pair[1], world))) == 1
    moved = apart = 0.0
    for start_, a, b in zip(before, *(stepper.model.parameters() for stepper in pair)):
        moved += (a - start_).square().sum().item()
        apart += (a - b).square().sum().item()
    assert moved > 0
    assert apart < 0.1 * moved
    resumed = stepper_of(GraphStepper, tiny(world), world, clip=1.0, accum=parts)
    resumed.load_state(copy.deepcopy(pair[1].state()), "here")
    compare_step([pair[1], resumed], 5, parts)
    found = digests(resumed, world)
    assert len(set(found)) == 1
    assert world.device.type != "cpu" or found == digests(pair[1], world)


def compare_step(pair, step, parts, *, spoiled=False):
    """Take a step on both; spoiled: the last rank's first batch is not finite."""
    world = pair[0].world
    torch.manual_seed(100 * step + world.rank)
    images = torch.randn(parts, 4, 3, 64, 48).to(world.device)
    targets = torch.randint(7, (parts, 4)).to(world.device)
    if spoiled and world.rank == world.size - 1:
        images[0] *= torch.nan
    losses, norms = [], []
    for stepper in pair:
        torch.manual_seed(100 * step + world.rank)
        stepper.net.train()
        for i in range(parts):
            loss = stepper.backward(images[i], targets[i], parts=parts, last=i + 1 == parts)
            losses.append(loss.item())
        norms.append(stepper.update().item())
    of_loss, of_norm = TOLERANCES[world.device.type]
    assert losses[parts:] == pytest.approx(losses[:parts], rel=of_loss, nan_ok=True)
    assert norms[1] == pytest.approx(norms[0], rel=of_norm, nan_ok=True)
    assert world.gather(norms[1]) == pytest.approx([norms[1]] * world.size, rel=0, nan_ok=True)


def tiny(world):
    """A model with other weights on each rank: those of rank 0 have to win."""
    torch.manual_seed(world.rank)
    model = QuadMamba((32, 48, 64, 96), depths=(2, 1, 1, 1), num_classes=7, drop_path=0.3)
    return model.to(world.device, memory_format=torch.channels_last)


def digests(stepper, world):
    """The weights of each rank as a few letters."""
    weights = [param.detach().cpu().numpy().tobytes() for param in stepper.model.parameters()]
    return world.gather(hashlib.sha256(b"".join(weights)).hexdigest())


def check_batch_norms(world):
    """All stop where statistics would be exchanged, and nobody where there are none of these."""
    with pytest.raises(RankError) as caught:
        stepper_of(GraphStepper, nn.SyncBatchNorm(3).to(world.device), world)
    assert (caught.value.__cause__ is None) == (world.rank > 0)
    assert world.rank or "TRAIN.SYNC_BN: expected False" in str(caught.value.__cause__)
    stepper_of(GraphStepper, tiny(world), world, sync_bn=True)


def ranks(command, count, gpus=""):
    """Run `command` as `count` ranks of one node that see `gpus`."""
    sizes = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    env = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        start(command, **env, RANK=rank, LOCAL_RANK=rank, CUDA_VISIBLE_DEVICES=gpus)
        for rank in range(count)
    ]
    return [finish(process, 400) for process in processes]


def visible():
    """The GPUs of this process, for others."""
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    return os.environ.get("CUDA_VISIBLE_DEVICES", numbers)


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "where", ["cpu", *(pytest.param(where, marks=needs_gpu) for where in ("shared", "nccl"))]
)
def test_ranks_take_the_steps_of_eager_ones(where):
    """nccl: on two GPUs, or where there is one as one rank of a launcher."""
    count = min(2, torch.cuda.device_count()) if where == "nccl" else 2
    ends = ranks(["-c", RANKS, where], count, "" if where == "cpu" else visible())
    for code, out, err in ends:
        assert code == 0, err
        assert "agreed" in out


@needs_gpu
@pytest.mark.timeout(900)
def test_a_launched_run_by_graph_goes_on_where_it_was(tmp_path):
    data = write_images(tmp_path / "data")
    flags = ["--data-path", data, "--output", tmp_path, "--compile", "graph", "--batch-size", 4]
    opts = {"DEVICE": "cuda", "MODEL__DIMS": "[32,48,64,96]", "TRAIN__ACCUM_STEPS": 2}
    for epochs, said in ((1, "done: best top-1"), (2, "after epoch 1 of 2")):
        words = arguments(*flags, "--img-size", 64, "--epochs", epochs, **opts)
        ends = ranks(["main.py", *words], min(2, torch.cuda.device_count()), visible())
        assert [code for code, *_ in ends] == [0] * len(ends), ends
        assert said in ends[0][1]
