"""The choice of a quadrant in one pass: its value, its gradient, and what it refuses."""

import pytest
import torch
from test_fused_interpreted import interpreted

from quadmamba.kernels.fused import quadrant_choice, quadrant_choice_ref
from quadmamba.kernels.fused.quadrant_choice import ops
from quadmamba.models.orders import ReleaseOrder
from quadmamba.models.quadtree import choose_quadrant, quadrant_logits, select_quadrant

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
CASES = {"56x56": (3, 56, 56), "odd": (2, 7, 13), "a-row": (4, 1, 6), "empty-batch": (0, 4, 4)}


def make(shape, noisy=True, seed=0):
    """Scores, and the other arguments for a shifted grid, whose scores count as before the roll."""
    torch.manual_seed(seed)
    maps = ReleaseOrder().maps(*shape[1:], (1, 1), torch.device("cpu"))
    noise = torch.empty(shape[0], 4).exponential_() if noisy else None
    return 3 * torch.randn(shape), (maps.pool, maps.count, noise, 0.7)


def truth_of(score, rest, grad):
    wide = score.detach().double().requires_grad_()
    pool, count, noise, tau = rest
    choice = quadrant_choice_ref(
        wide, pool, count.double(), None if noise is None else noise.double(), tau
    )
    choice.backward(grad.double())
    return choice.detach().float(), wide.grad.float()


def moved(rest, device):
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in rest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_choice_and_gradient(shape, noisy, device):
    score, rest = make(shape, noisy)
    grad = torch.randn(shape[0], 4)
    truth = truth_of(score, rest, grad)
    score = score.to(device).requires_grad_()
    choice = quadrant_choice(score, *moved(rest, device))
    choice.backward(grad.to(device))
    assert torch.equal(choice.detach().cpu(), truth[0])
    torch.testing.assert_close(score.grad.cpu(), truth[1], rtol=1e-5, atol=1e-7)


@interpreted
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_interpreted_choice_and_gradient(shape, noisy):
    score, rest = make(shape, noisy)
    grad = torch.randn(shape[0], 4)
    choice, soft, select = ops._choice.kernels["cuda"](score, *rest)
    found = ops._choice_backward.kernels["cuda"](grad, soft, *rest[:2], rest[3])
    truth = truth_of(score, rest, grad)
    assert torch.equal(choice, truth[0])
    assert torch.equal(select, choice.argmax(1, keepdim=True).int())
    torch.testing.assert_close(found.view(shape), truth[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gumbel", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_draws_alike_with_and_without_the_op(training, gumbel, monkeypatch):
    score = torch.randn(64, 9, 12, requires_grad=True)
    maps = ReleaseOrder().maps(9, 12, (2, 1), torch.device("cpu"))
    torch.manual_seed(3)
    plain = select_quadrant(quadrant_logits(score, maps), 0.7, training, gumbel)
    monkeypatch.setattr("quadmamba.models.quadtree.is_fused", lambda _: True)
    torch.manual_seed(3)
    fused = choose_quadrant(score, maps, 0.7, training, gumbel)
    assert torch.equal(fused, plain)
    assert fused.requires_grad == training
    assert len(fused.unique(dim=0)) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device):
    score, rest = make((2, 5, 6))
    score, rest = score.to(device).requires_grad_(), moved(rest, device)
    torch.library.opcheck(torch.ops.quadmamba.quadrant_choice.default, (score, *rest))
    compiled = torch.compile(quadrant_choice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(score, *rest), quadrant_choice(score, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(9, dtype=torch.int32)}, "pool of the 30 tokens"),
        ({0: torch.zeros(30)}, "integer pool"),
        ({1: torch.ones(3)}, "four counts"),
        ({1: torch.ones(4, dtype=torch.int64)}, "counts in float32"),
        ({2: torch.ones(3, 4)}, r"noise \(2, 4\)"),
        ({3: 0.0}, "temperature above 0"),
    ],
    ids=["length", "dtype", "count", "integers", "noise", "tau"],
)
def test_wrong_arguments_say_what_was_expected(change, message):
    score, rest = make((2, 5, 6))
    rest = [change.get(i, value) for i, value in enumerate(rest)]
    with pytest.raises(ValueError, match=message):
        quadrant_choice(score, *rest)
