"""A node runs where its parts would do nothing else, and nowhere else."""

import copy

import pytest
import torch
from node_cases import (  # noqa: F401
    SIZE,
    _ran,
    as_parts,
    assert_same,
    block_call,
    first_call,
    fuse,
    gradients,
    make_block,
    make_mixer,
    needs_kernels,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from quadmamba.kernels import nodes
from quadmamba.models import layers
from quadmamba.models.orders import QuadtreeOrder, ReleaseOrder

pytestmark = needs_kernels


class Adapted(layers.Linear):
    """A layer that someone puts in the place of another."""

    def forward(self, x):
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace(block):
    layer = Adapted(8, 16)
    layer.weight = block.op.in_proj.weight
    block.op.in_proj = layer


def biased(block):
    block.op.out_proj = nn.Linear(16, 8)


def override(block):
    forward = block.mlp.forward
    block.mlp.forward = lambda x: 2 * forward(x)


CHANGES = {  # name: what is done to a block of which its parts must run by themselves
    "a hook": lambda block: block.op.conv.register_forward_hook(lambda *call: 2 * call[2]),
    "a hook before": lambda block: block.norm2.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda block: block.mlp.fc1.register_full_backward_hook(lambda *_: None),
    "a hook of the predictor": lambda block: block.op.predictor.score[2].register_forward_hook(
        lambda *_: None
    ),
    "another layer": replace,
    "another layer of a known type": biased,
    "another forward": override,
    "another scan": lambda block: setattr(block.op, "select", lambda x: first(x)),
    "a parametrization": lambda block: parametrize.register_parametrization(
        block.op.in_proj, "weight", Double()
    ),
    "compiled in place": lambda block: block.op.compile(backend="eager"),
    "a parameter of another dtype": lambda block: setattr(
        block.op.ssm, "D", nn.Parameter(block.op.ssm.D.bfloat16())
    ),
    "no bias": lambda block: block.op.predictor.score[0].register_parameter("bias", None),
}


def first(x):
    return torch.eye(4)[:1].repeat(len(x), 1)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parts_run_by_themselves(change, ran, monkeypatch):
    block, x = make_block("quadtree"), torch.randn(*SIZE, 8)
    CHANGES[change](block)
    truth = as_parts(monkeypatch, lambda: gradients(block, block_call, x))
    found = gradients(block, block_call, x)
    untouched = change in ("another forward", "a hook before", "a backward hook")
    assert ran == (["Mixer"] if untouched else []), "an untouched mixer is a node still"
    assert_same(found, truth, 2e-5 if untouched else 0.0)


def test_hooks_of_a_module_itself_are_called_around_its_node(ran):
    block, seen = make_block("raster"), []
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    first_call(block, torch.randn(*SIZE, 8))
    assert seen == ["before", "after"]
    assert ran == ["Block", "Mixer"]


class Watch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def test_where_someone_watches_the_parts_run(ran):
    block, x = make_block("quadtree").eval(), torch.randn(*SIZE, 8)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    first_call(block, x)
    handle.remove()
    with Watch():
        first_call(block, x)
    with FlopCounterMode(display=False) as counter:
        first_call(block, x)
    assert counter.get_total_flops() > 0
    first_call(block, x.as_subclass(Sub))
    first_call(block, x[:0])
    wide = copy.deepcopy(block).double()
    first_call(wide, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        first_call(wide, x.double())
        wide.op(x.double())
    torch.compile(first_call, backend="eager")(block, x)
    assert ran == []
    block.op.order = ReleaseOrder()
    first_call(block, x)
    assert ran == []
    block.op.order = QuadtreeOrder()
    first_call(block, x)
    assert ran == ["Block", "Mixer"]


def test_a_branch_of_another_dtype_is_added_by_the_parts(ran):
    block, x = make_block("raster"), torch.randn(*SIZE, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, (values, _) = block(x, (x, None), (None, None))
        assert ran == ["Mixer"]
        _, (values, _) = block(x, (values, None), (None, None))
    assert ran == ["Mixer", "Block", "Mixer"]
    assert values.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", ["branch", "factor"])
def test_shapes_that_do_not_fit_are_named_by_the_parts(wrong, ran, monkeypatch):
    fuse(monkeypatch)
    block, x = make_block("raster"), torch.randn(*SIZE, 8)
    values = x[:, 1:] if wrong == "branch" else x
    with pytest.raises(ValueError, match="expected"):
        block(x, (values, torch.ones(2 if wrong == "factor" else 3)), (None, None))
    assert ran == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, ran):
    block, x = make_block("quadtree"), torch.randn(*SIZE, 8)
    with mode():
        torch.manual_seed(5)
        outputs = block_call(block, x)
    assert ran == ["Block", "Mixer"]
    assert not any(out.requires_grad for out in outputs)
    truth = gradients(block, block_call, x)
    assert all(torch.equal(out, truth[f"out{i}"]) for i, out in enumerate(outputs))


def test_the_default_is_the_gpu_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(nodes.Block, "forward", lambda *_: seen.append("ran"))
    first_call(make_block("raster"), torch.randn(*SIZE, 8))
    assert seen == []


def test_parameters_given_for_one_call_are_taken(ran):
    mixer, x = make_mixer("raster"), torch.randn(*SIZE, 8)
    params = {name: 2 * param.detach() for name, param in mixer.named_parameters()}
    found = torch.func.functional_call(mixer, params, (x,))
    with torch.no_grad():
        for name, param in mixer.named_parameters():
            param.copy_(params[name])
    assert torch.equal(found, mixer(x))
    assert ran == ["Mixer", "Mixer"]


def test_a_grid_of_other_channels_is_named(ran):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_mixer("raster")(torch.randn(*SIZE, 9))
    assert ran == []


@pytest.mark.parametrize(
    "name",
    ["norm2.weight", "mlp.fc1.bias", "op.out_norm.bias", "op.conv.weight", "op.in_proj.weight"],
)
def test_parameters_that_do_not_fit_are_named_by_the_parts(name, ran, monkeypatch):
    fuse(monkeypatch)
    block, x = make_block("raster"), torch.randn(*SIZE, 8)
    owner, _, last = name.rpartition(".")
    param = block.get_parameter(name)
    setattr(block.get_submodule(owner), last, nn.Parameter(param[..., :-1].detach().clone()))
    with pytest.raises(ValueError, match="expected"):
        first_call(block, x)
    assert "Block" not in ran
