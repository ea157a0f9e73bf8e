"""CUDA graphs of passes and steps equal the eager ones; where there can be none is an error."""

import copy

import pytest
import torch
from runs import arguments, run, two_ranks
from torch import nn

from quadmamba.models import QuadMamba
from quadmamba.utils.distributed import World
from quadmamba.utils.graph_stepper import GraphStepper, stepper_kind
from quadmamba.utils.graphs import GraphedBackward, GraphedCall
from quadmamba.utils.launch import DeviceError
from quadmamba.utils.stepper import Stepper

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def tiny():
    torch.manual_seed(0)
    return QuadMamba((32, 48, 64, 96), depths=(2, 1, 1, 1), num_classes=7, drop_path=0.3)


def stepper_of(kind, model, world, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return kind(model, optimizer, nn.CrossEntropyLoss(), world=world, amp="fp16", **settings)


def test_tensors_on_a_cpu_are_an_error():
    weight = nn.Parameter(torch.ones(2))
    for call in (GraphedCall(torch.sum), GraphedBackward(torch.sum, [weight])):
        with pytest.raises(ValueError, match="expected tensors on a GPU, got one on cpu"):
            call(torch.ones(2))


@pytest.mark.parametrize("world", [World(), World(launched=True, size=8)])
def test_a_stepper_that_cannot_record_is_an_error(world):
    with pytest.raises(DeviceError, match=f"got {world.size} on cpu;"):
        stepper_of(GraphStepper, nn.Linear(2, 2), world)


def test_ranks_on_gpus_step_by_graph():
    gpus = World(launched=True, device=torch.device("cuda"))
    assert stepper_kind("graph", gpus) is GraphStepper
    assert stepper_kind("off", gpus) is Stepper


def test_the_command_line_says_what_a_graph_needs(capsys):
    assert run("--throughput", "--compile", "graph", "--batch-size", 2) == 2
    assert "error: TRAIN.COMPILE graph: expected a GPU for each process" in capsys.readouterr().err
    assert run("--throughput", "--compile", "fast", "--batch-size", 2) == 2
    assert "TRAIN.COMPILE: expected one of off, graph" in capsys.readouterr().err


def test_one_of_two_ranks_says_it():
    words = arguments("--throughput", "--compile", "graph", "--batch-size", 2)
    results = two_ranks(["main.py", *words])
    assert [code for code, *_ in results] == [2, 2], results
    assert sum("got 2 on cpu;" in err for *_, err in results) == 1


@needs_gpu
def test_graphed_inference_equals_eager():
    model = tiny().cuda().eval()

    @torch.no_grad()
    def infer(images):
        with torch.autocast("cuda", torch.float16):
            return model(images)

    graphed = GraphedCall(infer)
    for size in ((2, 3, 64, 64), (2, 3, 64, 64), (3, 3, 40, 72)):
        images = torch.randn(size, device="cuda")
        torch.testing.assert_close(graphed(images), infer(images))


@needs_gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_graphed_steps_equal_eager(parts):
    world, model = World(device=torch.device("cuda")), tiny().cuda().train()
    pair = [
        stepper_of(kind, copy.deepcopy(model), world, clip=1.0) for kind in (Stepper, GraphStepper)
    ]
    for step in range(4):
        losses, norms = [], []
        images = torch.randn(parts, 4, 3, 64, 48, device="cuda")
        targets = torch.randint(7, (parts, 4), device="cuda")
        for stepper in pair:
            torch.manual_seed(step)
            for i in range(parts):
                last = i + 1 == parts
                loss = stepper.backward(images[i], targets[i], parts=parts, last=last)
                losses.append(loss.item())
            norms.append(stepper.update().item())
        assert losses[parts:] == pytest.approx(losses[:parts], rel=1e-2)
        assert norms[1] == pytest.approx(norms[0], rel=5e-2)
    assert pair[0].skipped == pair[1].skipped
    before, (eager, graphed) = model.parameters(), (stepper.model.parameters() for stepper in pair)
    moved = apart = 0.0
    for start, a, b in zip(before, eager, graphed):
        moved += (a - start).square().sum().item()
        apart += (a - b).square().sum().item()
    assert moved > 0
    assert apart < 0.1 * moved
