"""What the fused ops keep for their backward pass, and how their operations are counted."""

import torch
from test_fused import mlp_case, predictor_params
from torch.utils.flop_counter import FlopCounterMode

from quadmamba.kernels.fused import dwconv_silu, layer_norm, linear, mlp, predictor_score


def test_only_the_input_is_kept():
    x = torch.randn(2, 4, 4, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        predictor_score(x, predictor_params(16))
        dwconv_silu(x, torch.randn(16, 1, 3, 3))
        layer_norm(x, torch.ones(16), torch.zeros(16))
    assert {t.data_ptr() for t in saved if t.numel() > 256} == {x.data_ptr()}
    saved.clear()
    params = mlp_case(x.shape)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(**{**params, "x": x})
    shapes = [tuple(t.shape) for t in saved if t.dim() == x.dim()]
    assert shapes == [(2, 4, 4, 16), (2, 4, 4, 35)], "x and the hidden values, once"


def test_flops():
    x = torch.randn(2, 4, 4, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        dwconv_silu(x, torch.randn(16, 1, 3, 3)).sum().backward()
    assert counter.get_total_flops() == 3 * 18 * x.numel()
    with FlopCounterMode(display=False) as counter:
        predictor_score(x, predictor_params(16)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * (16 * 16 + 16 * 8 + 8 * 4 + 4 * 2)

    params = mlp_case((2, 4, 4, 16))
    with FlopCounterMode(display=False) as counter:
        mlp(**{**params, "x": x}).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * (16 * 35 + 35 * 17)
    with FlopCounterMode(display=False) as counter:
        linear(x, torch.randn(3, 5, 16)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 16 * 15
