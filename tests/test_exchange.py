"""Ranks average their gradients and share their weights as one flat bucket after another."""

import math

import pytest
import torch
from runs import two_ranks
from torch import nn

from quadmamba.utils.distributed import World
from quadmamba.utils.exchange import GradientMean, share_weights

SHAPES = [((3, 5), torch.float32), ((4,), torch.float64), ((), torch.float32)]
SHAPES += [((6, 3, 2, 2), torch.float32), ((7,), torch.bfloat16), ((40,), torch.float32)]


def make_params():
    """A parameter of each shape and type, one of them in channels last, and the two more."""
    shapes = [*SHAPES, ((2, 3), torch.float32), ((5,), torch.float32)]
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
    params[3].data = params[3].to(memory_format=torch.channels_last)
    return params


def grads_of(rank, step):
    """The gradients of a rank, with None where there is none."""
    rng = torch.Generator().manual_seed(10 * step + rank)
    grads = [torch.randn(shape, generator=rng).to(dtype) for shape, dtype in SHAPES]
    grads[3] = grads[3].to(memory_format=torch.channels_last)
    alone = torch.randn(2, 3, generator=rng) if rank == 0 else None
    return [*grads, alone, None]


def check_means(world, sums, bucket_bytes):
    """Each gradient is the mean of the ranks' own, in place, and None where all have None."""
    params = make_params()
    average = GradientMean(params, world, bucket_bytes=bucket_bytes)
    for step in range(3):
        own = grads_of(world.rank, step)
        for param, grad in zip(params, own):
            param.grad = grad
        sums.clear()
        average()
        for param, before, *all_ranks in zip(params, own, *(grads_of(r, step) for r in (0, 1))):
            assert before is None or param.grad is before
            parts = [grad / 2 for grad in all_ranks if grad is not None]
            if parts:
                torch.testing.assert_close(param.grad, sum(parts), rtol=0, atol=0)
            else:
                assert param.grad is None
    return len(sums)


def check_faults(world):
    """NaN of one rank reaches all; a gradient where all had none before is an error."""
    params = make_params()[:2]
    average = GradientMean(params, world)
    for fault in (0.0, math.nan):
        for param in params[:1]:
            param.grad = torch.full_like(param, fault if world.rank else 1.0)
        average()
        assert params[0].grad.isnan().all() == math.isnan(fault)
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(ValueError, match=r"got one of a parameter of shape \(4,\)"):
        average()


def check_weights(world):
    """Parameters and buffers of all types become those of rank 0 and stay where they are."""
    models = []
    for seed in (0, world.rank):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).double())
        model = model.to(memory_format=torch.channels_last)
        model[1].num_batches_tracked += 5 * seed
        model[1].running_mean += seed
        models.append(model)
    first, own = models
    places = [value.data_ptr() for value in own.state_dict().values()]
    share_weights(own, world)
    assert [value.data_ptr() for value in own.state_dict().values()] == places
    for (name, a), b in zip(first.state_dict().items(), own.state_dict().values()):
        assert torch.equal(a, b), name


RANKS = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, "tests")
from quadmamba.utils.distributed import join
from quadmamba.utils.launch import place_from_env
from test_exchange import check_faults, check_means, check_weights

sums, all_reduce = [], dist.all_reduce
dist.all_reduce = lambda flat, **how: sums.append(flat.numel()) or all_reduce(flat, **how)
with join(place_from_env(), torch.device("cpu"), (), timeout=60) as world:
    assert check_means(world, sums, 2**20) == 3  # a bucket for each type
    assert check_means(world, sums, 160) == 6  # 60 + 4, 288, 160, 24 bytes; two types
    assert check_means(world, sums, 1) == 7  # a bucket for each parameter
    check_faults(world)
    check_weights(world)
    print("agreed", flush=True)
"""


def test_two_ranks_share_weights_and_average_gradients():
    for code, out, err in two_ranks(["-c", RANKS]):
        assert code == 0, err
        assert "agreed" in out


def test_one_rank_keeps_its_gradients():
    params = make_params()
    for param, grad in zip(params, grads_of(0, 0)):
        param.grad = grad
    GradientMean(params, World())()
    share_weights(nn.Linear(2, 2), World())
    assert params[-1].grad is None
    for param, grad in zip(params[:-1], grads_of(0, 0)):
        assert torch.equal(param.grad, grad)
