"""The order of the training images: dealt to any ranks, begun anywhere."""

import numpy as np
import pytest

from quadmamba.data.loaders import TrainSampler


def batches_of(ranks, batch, *, images=37, epoch=3, seen=0):
    """The images of each step over all ranks."""
    samplers = [TrainSampler(images, rank=r, world_size=ranks, seed=1) for r in range(ranks)]
    steps = []
    for sampler in samplers:
        sampler.set_epoch(epoch, seen)
        draws = list(sampler)
        assert len(draws) == len(sampler)
        assert {number for number, _ in draws} <= {epoch}
        own = [index for _, index in draws]
        steps.append([own[i : i + batch] for i in range(0, len(own) - batch + 1, batch)])
    assert len({len(own) for own in steps}) == 1
    return [sorted(index for part in parts for index in part) for parts in zip(*steps)]


def test_the_order_is_drawn_by_numpy_from_seed_and_epoch():
    drawn = np.random.default_rng((6, 2)).permutation(11).tolist()
    for rank, seen in ((0, 0), (2, 0), (1, 4)):
        sampler = TrainSampler(11, rank=rank, world_size=3, seed=6)
        sampler.set_epoch(2, seen)
        share = drawn[seen:][rank::3][: (11 - seen) // 3]
        assert list(sampler) == [(2, index) for index in share]
    assert len(TrainSampler(11, rank=0, world_size=3, seed=6)) == 3
    sampler.set_epoch(2, 50)
    assert (len(sampler), list(sampler)) == (0, [])


def test_a_step_has_the_same_images_for_any_ranks_with_the_same_total_batch():
    assert batches_of(1, 8) == batches_of(2, 4) == batches_of(4, 2)
    assert len(batches_of(1, 8)) == 4
    assert batches_of(1, 8) != batches_of(1, 8, epoch=4)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 8), (2, 4), (3, 2)])
def test_an_epoch_begun_in_its_middle_has_the_rest(ranks, batch):
    steps = batches_of(ranks, batch)
    for done in range(len(steps) + 1):
        assert batches_of(ranks, batch, seen=done * ranks * batch) == steps[done:]


def test_other_ranks_see_what_was_not_seen():
    first = [index for step in batches_of(2, 4)[:2] for index in step]
    rest = [index for step in batches_of(3, 3, seen=16) for index in step]
    assert not set(first) & set(rest)
    assert len(set(first + rest)) == 16 + 18
