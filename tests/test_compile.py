"""torch.compile of the whole model: one graph, with the index maps as constants."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from quadmamba.models import QuadMamba

REBUILDS = {"argsort", "meshgrid"}  # what only the making of a map needs


@pytest.mark.parametrize(("mode", "sizes"), [("train", [(40, 56)]), ("eval", [(40, 56), (56, 40)])])
def test_one_graph_equals_eager_at_every_size(mode, sizes):
    torch._dynamo.reset()
    torch.manual_seed(0)
    orders = ("quadtree", "release", "window", "raster")
    model = QuadMamba((16, 16, 16, 16), depths=(2, 1, 1, 1), orders=orders, drop_path=0.2)
    model.train(mode == "train")
    used = []

    def backend(graph, inputs):
        used.append({getattr(node.target, "__name__", "") for node in graph.graph.nodes})
        return aot_eager(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in sizes:
        images, found = torch.randn(2, 3, *size), []
        for call in (compiled, model):  # the compiled one makes the maps that eager finds
            model.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            logits = call(images)
            logits.square().sum().backward()
            found.append([logits.detach(), *(p.grad for p in model.parameters())])
        for traced, eager in zip(*found):
            assert (traced is None) == (eager is None)
            if eager is not None:
                torch.testing.assert_close(traced, eager)
    assert len(used) == len(sizes)
    for names in used:
        assert "linear" in names
        assert not names & REBUILDS
