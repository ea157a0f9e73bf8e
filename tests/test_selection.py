"""Which quadrant a block chooses, and where its grid is rolled."""

from pathlib import Path

import pytest
import torch

from quadmamba.configs import load_cfg
from quadmamba.models import QuadMamba, build_model
from quadmamba.models.orders import QuadtreeOrder
from quadmamba.models.quadtree import (
    first_quadrant,
    quadrant_logits,
    random_quadrant,
    select_quadrant,
)
from quadmamba.models.ss2d import QuadSS2D

ROOT = Path(__file__).parent.parent


def tiny(order="quadtree", **kwargs):
    kwargs = {"orders": (order,) * 4, "num_classes": 5, "ssm_ratio": 1.0, **kwargs}
    return QuadMamba((8, 8, 12, 16), depths=(2, 2, 1, 1), **kwargs)


def test_shift_directions_follow_the_global_block_index():
    model = build_model(load_cfg(ROOT / "configs/quadmamba_tiny.yaml"))
    signs = [block.op.sign for stage in model.stages[:2] for block in stage]
    assert signs == [None, (1, 1), None, (-1, -1), None, (1, -1), None, (-1, 1)]
    still = build_model(
        load_cfg(ROOT / "configs/quadmamba_tiny.yaml", opts=["MODEL.SHIFT", "False"])
    )
    assert all(m.sign is None for m in still.modules() if isinstance(m, QuadSS2D))


def test_shift_directions_can_be_fewer():
    model = tiny(orders=("quadtree",) * 4, shift_directions=1)
    assert [block.op.sign for stage in model.stages for block in stage if block.op.sign] == [
        (1, 1)
    ] * 2
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"shift_directions: expected 1 to 4, got {wrong}"):
            tiny(shift_directions=wrong)


@pytest.mark.parametrize(
    "keywords", [{"selection": "first"}, {"selection": "random"}, {"partition": (2, 2)}]
)
def test_where_nothing_is_learned_there_is_no_predictor(keywords):
    torch.manual_seed(0)
    model, images = tiny(**keywords).train(), torch.randn(4, 3, 64, 64)
    assert not any("predictor" in name for name, _ in model.named_parameters())
    model(images).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()), "all others learn"
    with torch.no_grad():
        same = torch.equal(model(images), model(images))
        assert same == (keywords != {"selection": "random"}), "training draws quadrants"
        assert torch.equal(model.eval()(images), model(images))


def test_the_fixed_selections():
    device = torch.device("cpu")
    assert first_quadrant(3, device).tolist() == [[1, 0, 0, 0]] * 3
    for training in (True, False):
        torch.manual_seed(0)
        choice = random_quadrant(20000, device, 1, training)
        assert set(choice.sum(1).tolist()) == {1.0}
        torch.testing.assert_close(choice.mean(0), torch.full((4,), 0.25), rtol=0, atol=0.015)
    assert torch.equal(choice, random_quadrant(20000, device, 1, False))
    assert not torch.equal(choice, random_quadrant(20000, device, 2, False))
    op = QuadSS2D(4, order=QuadtreeOrder(), selection="first")
    assert op.select(torch.randn(2, 8, 8, 8)).argmax(1).tolist() == [0, 0]
    fixed = QuadSS2D(4, order=QuadtreeOrder((4, 4)), selection="random")
    assert fixed.selection == "first", "both levels are the same: there is nothing to select"
    assert (op.seed, QuadSS2D(4, order=QuadtreeOrder(), seed=3).seed) == (0, 3)


def test_without_noise_training_takes_the_highest_score():
    torch.manual_seed(0)
    logits = torch.randn(256, 4, requires_grad=True)
    choice = select_quadrant(logits, 0.5, True, gumbel=False)
    assert torch.equal(choice.argmax(1), logits.argmax(1))
    choice[:, 0].sum().backward()
    soft = (logits.detach() / 0.5).softmax(1)
    eye = torch.eye(4)[0]
    torch.testing.assert_close(logits.grad, soft[:, :1] * (eye - soft) / 0.5)
    model, images = tiny(gumbel=False).train(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))


def test_selection_is_one_hot_and_never_an_empty_quadrant():
    torch.manual_seed(0)
    score = torch.randn(64, 1, 6, requires_grad=True)
    maps = QuadtreeOrder().maps(1, 6, (0, 0), torch.device("cpu"))  # no lower quadrants
    logits = quadrant_logits(score, maps)
    torch.testing.assert_close(logits[:, 0], score[:, 0, :3].mean(1))
    for training in (True, False):
        choice = select_quadrant(logits, 1.0, training)
        assert set(choice.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(choice.sum(1), torch.ones(64))
        assert choice[:, 2:].sum() == 0
    (select_quadrant(logits, 1.0, True) * torch.randn(64, 4)).sum().backward()
    assert score.grad.isfinite().all()
    assert score.grad.abs().sum() > 0


def test_gumbel_selects_with_the_probabilities_of_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 0.0, 1.0])
    frequency = select_quadrant(logits.expand(20000, 4), 1.0, True).mean(0)
    torch.testing.assert_close(frequency, logits.softmax(0), rtol=0, atol=0.015)
