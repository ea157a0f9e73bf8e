"""selective_scan where only a GPU can show it: streams, graphs, sizes past 32 bits."""

from __future__ import annotations

import pytest
import torch

from quadmamba.kernels import selective_scan as package

scan = package.selective_scan
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make(b, d, l, g, dtype=torch.float16):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

    inputs = {
        "u": normal(b, d, l),
        "delta": normal(b, d, l) - 2,
        "A": -torch.rand(d, 1, device="cuda") - 0.1,
        "B": normal(b, g, 1, l),
        "C": normal(b, g, 1, l),
        "D": torch.rand(d, device="cuda"),
        "delta_bias": torch.rand(d, device="cuda"),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def step(inputs):
    y = scan(**inputs, delta_softplus=True)
    return y, *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))


def test_second_stream():
    inputs = make(4, 64, 1000, 2)
    expected = step(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        found = step(doubled)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_graph_capture_and_replay():
    inputs = make(4, 64, 1000, 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    with torch.no_grad():
        inputs["u"].mul_(-0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(inputs)))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60e9,
    reason="needs 60 GB of GPU memory",
)
def test_more_than_two_to_the_31_elements_and_65535_channels():
    d, l, group = 70_016, 32_768, 64
    inputs = make(1, d, l, d // group)
    assert inputs["u"].numel() > 2**31
    found = step(inputs)
    tail = {
        name: (x[:, -group:] if name in ("u", "delta") else x[-group:]).detach()
        for name, x in inputs.items()
        if name not in ("B", "C")
    }
    tail["B"], tail["C"] = (inputs[name][:, -1:].detach() for name in ("B", "C"))
    small = {name: tail[name].clone().requires_grad_() for name in inputs}
    expected = step(small)
    for name, whole, part in zip(("y", *inputs), found, expected):
        if name in ("B", "C"):
            torch.testing.assert_close(whole[:, -1:], part)
        else:
            rows = whole[:, -group:] if whole.dim() == 3 else whole[-group:]
            assert torch.equal(rows, part), name
