"""The short ways around torch's dispatcher and around Triton's launch take no wrong turn."""

import importlib.util
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quadmamba.kernels.dispatch import EagerOp
from quadmamba.kernels.quadtree_gather import gather_in

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def split_op(registered=None):
    """x, [a, b] -> (x + a, [x b, 2 x]): lists on both sides."""
    op = EagerOp(registered, {"cpu": lambda x, pair: (x + pair[0], [x * pair[1], 2 * x])})

    def save(ctx, inputs, output):
        x, pair = inputs
        assert isinstance(output[1], list)
        ctx.save_for_backward(x, pair[1])

    def backward(ctx, grad, grads):
        x, b = ctx.saved_tensors
        return grad + grads[0] * b + 2 * grads[1], [grad, grads[0] * x]

    op.differentiate(backward, save)
    return op


def test_lists_of_inputs_and_outputs_have_their_gradients():
    x, a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    first, (second, third) = split_op()(x, [a, b])
    assert torch.equal(first, x + a)
    assert torch.equal(third, 2 * x)
    assert torch.autograd.gradcheck(lambda x, a, b: split_op()(x, [a, b])[0], (x, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: split_op()(x, [a, b])[1][0], (x, a, b))
    assert second.grad_fn is third.grad_fn


@pytest.mark.parametrize("watcher", [Function, Dispatch])
def test_under_a_mode_the_registered_op_is_called(watcher):
    op, x = EagerOp(lambda _: "registered", {"cpu": lambda _: "kernel"}), torch.zeros(2)
    assert op(x) == "kernel"
    with watcher():
        assert op(x) == "registered"


def test_for_a_subclass_and_a_transform_the_registered_op_is_called():
    seen = []
    op = EagerOp(lambda x: seen.append("op") or x, {"cpu": lambda x: seen.append("kernel") or x})
    op(torch.zeros(2).as_subclass(Sub))
    torch.func.vmap(op)(torch.zeros(2, 2))
    assert seen == ["op", "op"]


def test_a_gradient_of_the_decision_alone_is_found():
    x, decision = torch.randn(1, 4, 3), torch.eye(4)[:1].requires_grad_()
    fine, coarse = torch.tensor([1, 0, 2, 3]), torch.arange(4)
    y = gather_in(x, decision, fine, coarse, torch.zeros(4, dtype=torch.long))
    assert torch.autograd.grad(y.square().sum(), decision)[0].abs().max() > 0


@needs_triton
def test_the_key_of_a_kernel_tells_what_triton_specialises_for():
    from quadmamba.kernels.fused.layer_norm.triton import _forward_kernel as kernel

    x = torch.zeros(64)
    calls = {
        "call": ((x, None, 96, 0.5), {"BLOCK": 2}),
        "dtype": ((x.half(), None, 96, 0.5), {"BLOCK": 2}),
        "alignment": ((x[1:], None, 96, 0.5), {"BLOCK": 2}),
        "tensor": ((x, x, 96, 0.5), {"BLOCK": 2}),
        "not divisible": ((x, None, 97, 0.5), {"BLOCK": 2}),
        "one": ((x, None, 1, 0.5), {"BLOCK": 2}),
        "64 bits": ((x, None, 96 << 30, 0.5), {"BLOCK": 2}),
        "integer": ((x, None, 96, 5), {"BLOCK": 2}),
        "constant": ((x, None, 96, 0.5), {"BLOCK": 4}),
        "tuple": ((x, None, 96, (x, 32)), {"BLOCK": 2}),
        "not divisible in a tuple": ((x, None, 96, (x, 33)), {"BLOCK": 2}),
        "alignment in a tuple": ((x, None, 96, (x[1:], 32)), {"BLOCK": 2}),
    }
    keys = {name: kernel.key(*call) for name, call in calls.items()}
    assert len(set(keys.values())) == len(calls)
    again = kernel.key((torch.ones(32), None, 192, 0.25), {"BLOCK": 2})
    assert again == keys["call"], "other sizes and values need no other kernel"


@needs_triton
def test_a_constant_among_the_arguments_counts_by_value():
    from quadmamba.kernels.fused.jit import Kernel
    from quadmamba.kernels.fused.mlp import triton as module

    kernel = module._gelu_kernel
    assert isinstance(kernel, Kernel)
    x = torch.zeros(64)
    assert kernel.key((x, x, 64, 128), {}) != kernel.key((x, x, 64, 256), {})


class Compiled:
    """Stands for a compiled kernel: notes what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *args):
        self.launches.append(("run", *args))

    def __getitem__(self, grid):
        return lambda *args: self.launches.append(("hooked", grid, *args))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel of three tensors and a size whose launches are noted, and the compiled one."""
    from quadmamba.kernels.fused.mlp.triton import _gelu_kernel as kernel

    compiled = Compiled()

    class Jitted:
        def __getitem__(self, grid):
            return partial(self.launch, grid)

        def launch(self, grid, *args, **constants):
            compiled.launches.append(("jit", grid, args, constants))
            return compiled

    monkeypatch.setattr(kernel, "jitted", Jitted())
    monkeypatch.setattr(kernel, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    stream = lambda device: f"stream of {device}"  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
    return kernel, compiled.launches


@needs_triton
def test_a_second_launch_calls_the_compiled_kernel(kernel):
    (kernel, launches), (x, y) = kernel, torch.zeros(2, 64)
    constants = {"BLOCK": 256, "num_warps": 4}
    for size in (64, 128, 7):
        kernel[(3,)](x, y, size, **constants)
    assert launches[0] == ("jit", (3,), (x, y, 64), constants)
    how = (3, 1, 1, "stream of 1", "function", "metadata", None, None, None)
    assert launches[1] == ("run", *how, x.data_ptr(), y.data_ptr(), 128, 256)
    assert launches[2][0] == "jit", "another kernel where 16 does not divide the size"


@needs_triton
def test_a_kernel_with_fixed_arguments_looks_at_the_others_alone(kernel):
    (kernel, launches), (x, y) = kernel, torch.zeros(2, 64)
    constants = {"size": 64, "BLOCK": 256, "num_warps": 4}
    launch = kernel.fixed(**constants)
    launch((3, 2), x, y)
    launch((3, 2), y, x)
    launch((3, 2), x, y[1:])
    assert launches[0] == ("jit", (3, 2), (x, y), constants)
    assert launches[1][:4] == ("run", 3, 2, 1)
    assert launches[1][10:] == (y.data_ptr(), x.data_ptr(), 64, 256)
    assert launches[2][0] == "jit", "another kernel where an address is not aligned"
    kernel.fixed(**{**constants, "size": 7})((3, 2), x, y)
    assert launches[3][0] == "jit"


@needs_triton
def test_hooks_of_triton_see_every_launch(kernel):
    from triton import knobs

    (kernel, launches), x = kernel, torch.zeros(64)

    def hook(metadata):
        del metadata

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        kernel[(3,)](x, x, 64, BLOCK=256, num_warps=4)
        chain.add(hook)
        kernel[(3,)](x, x, 64, BLOCK=256, num_warps=4)
        chain.remove(hook)
    assert [launch[0] for launch in launches] == ["jit", "hooked", "run", "hooked"]
    assert launches[1] == ("hooked", (3, 1, 1), x, x, 64, 256)
