"""Our mixers equal their restatements, the official one and the plain one, in float64."""

import pytest
import torch

from benchmarks.official import OfficialMixer
from benchmarks.plain import PlainMixer
from quadmamba.kernels import selective_scan
from quadmamba.models.orders import QuadtreeOrder, RasterOrder, ReleaseOrder
from quadmamba.models.ss2d import SS2D, QuadSS2D

CASES = {
    "raster": lambda: SS2D(8, order=RasterOrder(), d_state=2),
    "release": lambda: QuadSS2D(8, order=ReleaseOrder(), d_state=2),
    "release-shifted": lambda: QuadSS2D(8, order=ReleaseOrder(), sign=(1, -1), tau=0.5),
}


ALL_CASES = {
    **CASES,
    "quadtree-shifted": lambda: QuadSS2D(8, order=QuadtreeOrder(), sign=(1, -1), tau=0.5),
}
RESTATED = {
    "official": lambda op: OfficialMixer(op, selective_scan.selective_scan_ref),
    "plain": PlainMixer,
}
PAIRS = [("official", name) for name in CASES] + [("plain", name) for name in ALL_CASES]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("restated", "name"), PAIRS)
def test_mixer_equals_its_restatements(restated, name, training):
    torch.manual_seed(0)
    op = ALL_CASES[name]().double().train(training)
    results = []
    for mixer in (op, RESTATED[restated](op)):
        torch.manual_seed(1)  # the same Gumbel noise
        op.zero_grad()
        x = torch.randn(3, 16, 16, 8, dtype=torch.float64, requires_grad=True)
        y = mixer(x)
        (y * torch.randn_like(y)).sum().backward()
        grads = {key: p.grad for key, p in op.named_parameters() if p.grad is not None}
        results.append({"output": y.detach(), "x": x.grad, **grads})
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 2 + sum(
        training or "predictor" not in key for key, _ in op.named_parameters()
    )
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-9, atol=1e-9, msg=key)
