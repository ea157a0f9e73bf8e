"""Random erasing: the rectangles of timm's, filled with what their mode says."""

import random

import pytest
import torch
from timm.data.random_erasing import RandomErasing

from quadmamba.data.erasing import Hole, draw_hole, erase


def timm_hole(size, probability):
    """(top, left, height, width) of what timm erases, None for nothing."""
    erasing = RandomErasing(probability, mode="const", device="cpu")
    erased = (erasing(torch.ones(3, size, size)) == 0).all(0).nonzero()
    if not len(erased):
        return None
    (top, left), (bottom, right) = erased.min(0).values.tolist(), erased.max(0).values.tolist()
    return top, left, bottom - top + 1, right - left + 1


@pytest.mark.parametrize("probability", [1.0, 0.25])
@pytest.mark.parametrize("size", [16, 50])
def test_the_same_draws_give_the_holes_of_timm(size, probability):
    found, expected = [], []
    for seed in range(150):
        random.seed(seed)
        hole = draw_hole(size, probability)
        found.append(hole and tuple(hole[:4]))
        random.seed(seed)
        expected.append(timm_hole(size, probability))
    assert found == expected
    assert sum(hole is not None for hole in found) / 150 == pytest.approx(probability, abs=0.1)


def test_holes_are_of_all_shapes_and_places():
    random.seed(0)
    holes = [draw_hole(224, 1.0) for _ in range(2000)]
    areas = torch.tensor([hole.height * hole.width / 224**2 for hole in holes])
    aspects = torch.tensor([hole.height / hole.width for hole in holes])
    assert (aspects > 1).float().mean().item() == pytest.approx(0.5, abs=0.04), "taller than wide"
    assert 0.28 < aspects.min() < 0.33
    assert 3.0 < aspects.max() < 3.6
    assert 0.018 < areas.min() < 0.03
    assert 0.31 < areas.max() < 0.34
    assert areas.mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    for start, length in (("top", "height"), ("left", "width")):
        room = [(getattr(hole, start), 224 - getattr(hole, length)) for hole in holes]
        shares = torch.tensor([place / free for place, free in room])
        assert (shares.min(), shares.max()) == (0, 1), "up to both borders"
        assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    seeds = {hole.seed for hole in holes}
    assert len(seeds) == 2000
    assert 2**60 < max(seeds) < 2**63


def test_ten_tries_find_a_hole_that_fits_or_none(monkeypatch):
    drawn = []

    def largest(_, high):
        drawn.append(high)
        return high  # a third of the image, 3.3 times as tall as wide: taller than the image

    monkeypatch.setattr(random, "uniform", largest)
    assert draw_hole(224, 1.0) is None
    assert len(drawn) == 20


def test_what_fills_a_hole():
    hole = Hole(3, 5, 40, 50, 9)
    before = torch.full((2, 3, 64, 64), 7.0)
    images = {m: erase(before.clone(), [None, hole], m) for m in ("pixel", "rand", "const")}
    for filled in images.values():
        assert torch.equal(filled[0], before[0])
        outside = filled[1].clone()
        outside[:, 3:43, 5:55] = 7.0
        assert torch.equal(outside, before[1])
    noise, colour, nothing = (filled[1, :, 3:43, 5:55] for filled in images.values())
    assert noise.unique().numel() == 3 * 40 * 50, "each value of its own: no grey, no lines"
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert colour.unique().numel() == 3
    assert torch.equal(colour, colour[:, :1, :1].expand_as(colour)), "one colour, not grey"
    assert not nothing.any()
    generator = torch.Generator().manual_seed(9)
    assert torch.equal(colour[:, 0, 0], torch.randn(3, generator=generator))
