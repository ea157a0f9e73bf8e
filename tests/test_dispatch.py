"""The short ways around torch's dispatcher and around Triton's launch take no wrong turn."""

import importlib.util
from functools import partial
from types import SimpleNamespace

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


class Compiled:
    """Stands for a compiled kernel: notes what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *args):
        self.launches.append(("run", *args))

    def __getitem__(self, grid):
        return lambda *args: self.launches.append(("hooked", grid, *args))


CONSTANTS = {"size": 64, "BLOCK": 256, "num_warps": 4}


@pytest.fixture
def device(monkeypatch):
    """The current device, a list of one number."""
    now = [1]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: now[0], raising=False)
    stream = lambda device: f"stream of {device}"  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
    return now


@pytest.fixture
def kernel(monkeypatch, device):
    """A kernel of tensors and a size whose launches are noted, and the compiled one."""
    del device
    from quadmamba.kernels.fused.mlp.triton import _gelu_kernel as kernel

    compiled = Compiled()

    class Jitted:
        def __getitem__(self, grid):
            return partial(self.launch, grid)

        def launch(self, grid, *args, **constants):
            compiled.launches.append(("jit", grid, args, constants))
            return compiled

    monkeypatch.setattr(kernel, "jitted", Jitted())
    return kernel, compiled


def on_cuda(x):
    """What a launch sees of a tensor on a GPU."""
    return SimpleNamespace(data_ptr=x.data_ptr, dtype=x.dtype, is_cuda=True)


@needs_triton
def test_another_kernel_is_compiled_for_whatever_triton_specialises_for(kernel, device):
    (kernel, compiled), x = kernel, torch.zeros(64)
    launch, whole = kernel.fixed(**CONSTANTS), (x, None, (x, x), x)
    calls = {
        "all": whole,
        "dtype": (x.half(), *whole[1:]),
        "no tensor": (None, *whole[1:]),
        "a tensor": (x, x, *whole[2:]),
        "kind of device": (on_cuda(x), *whole[1:]),
        "alignment": (x[1:], *whole[1:]),
        "alignment of the last": (*whole[:3], x[1:]),
        "dtype in a tuple": (x, None, (x, x.half()), x),
        "alignment in a tuple": (x, None, (x[1:], x), x),
        "alignment at the end of a tuple": (x, None, (x, x[1:]), x),
        "kind of device in a tuple": (x, None, (x, on_cuda(x)), x),
        "nothing in a tuple": (x, None, (x, None), x),
        "length of a tuple": (x, None, (x,), x),
    }
    for name, args in calls.items():
        launch((3,), *args)
        assert compiled.launches[-1][0] == "jit", name
    device[0] = 0
    launch((3,), *whole)
    assert compiled.launches[-1][0] == "jit", "device"
    device[0] = 1
    for name, args in calls.items():
        launch((3,), *args)
        assert compiled.launches[-1][0] == "run", name
    other = torch.ones(32)
    launch((3,), other, None, (other, other), other)
    assert compiled.launches[-1][0] == "run", "other sizes need no other kernel"


@needs_triton
def test_a_second_launch_calls_the_compiled_kernel(kernel):
    (kernel, compiled), (x, y) = kernel, torch.zeros(2, 64)
    launch = kernel.fixed(**CONSTANTS)
    launch((3, 2), x, y)
    launch((3, 2), y, x)
    launch((5,), x, (y, None))
    launch((5,), x, (y, None))
    kernel.fixed(**{**CONSTANTS, "size": 7})((3, 2), x, y)
    first, second, _, third, fourth = compiled.launches
    assert first == ("jit", (3, 2), (x, y), CONSTANTS)
    how = "stream of 1", "function", "metadata", None, None, None
    assert second == ("run", 3, 2, 1, *how, y.data_ptr(), x.data_ptr(), 64, 256)
    assert third == ("run", 5, 1, 1, *how, x.data_ptr(), (y.data_ptr(), None), 64, 256)
    assert fourth[0] == "jit"


@needs_triton
def test_constants_are_the_last_arguments(kernel):
    with pytest.raises(AssertionError, match="last arguments"):
        kernel[0].fixed(out=None, BLOCK=256)


@needs_triton
@pytest.mark.parametrize("scratch", ["", "global_scratch_size", "profile_scratch_size"])
def test_the_launcher_in_c_is_called_where_nothing_comes_before(kernel, scratch, monkeypatch):
    """As Triton's own launcher would call it; that one is called where it has memory to find."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    (kernel, compiled), x, calls = kernel, torch.zeros(64), []
    run = object.__new__(driver.CudaLauncher)
    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1}
    aligns = {"global_scratch_align": 1, "profile_scratch_align": 1}
    flags = {"launch_cooperative_grid": False, "launch_pdl": True}
    run.__dict__.update(**sizes, **aligns, **flags, launch=lambda *args: calls.append(args))
    monkeypatch.setattr(compiled, "run", run)
    monkeypatch.setattr(driver.CudaLauncher, "__call__", watched(driver.CudaLauncher, calls))
    launch = kernel.fixed(**CONSTANTS)
    launch((3, 2), x, x)
    launch((3, 2), x, x)
    run(3, 2, 1, "stream of 1", "function", "metadata", *[None] * 3, *[x.data_ptr()] * 2, 64, 256)
    assert calls == [calls[0], "Triton's own", calls[0]]
    setattr(run, scratch or "num_ctas", 1)
    monkeypatch.setattr(driver._allocation, "_allocator", Allocator())
    monkeypatch.setattr(driver._allocation, "_profile_allocator", Allocator())
    launch = kernel.fixed(**CONSTANTS)
    calls.clear()
    launch((3, 2), x, x)
    launch((3, 2), x, x)
    assert calls[:-1] == (["Triton's own"] if scratch else [])
    assert ("memory" in calls[-1]) == bool(scratch)


class Allocator:
    def get(self):
        return lambda *_: "memory"


def watched(launcher, calls):
    """A launcher's call, noted before it is made."""
    inner = launcher.__call__

    def call(self, *args):
        calls.append("Triton's own")
        return inner(self, *args)

    return call


@needs_triton
def test_hooks_of_triton_see_every_launch(kernel, monkeypatch):
    from triton import knobs

    (kernel, compiled), x = kernel, torch.zeros(64)
    launch, runtime = kernel.fixed(**CONSTANTS), knobs.runtime

    def hook(metadata):
        del metadata

    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        launch((3,), x, x)
        chain.add(hook)
        launch((3,), x, x)
        chain.remove(hook)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        for value in (hook, None):  # as they are set without a chain
            with monkeypatch.context() as patch:
                patch.setattr(runtime, name, value)
                launch((3,), x, x)
    kinds = ["jit", "hooked", "run", "hooked", "hooked", "run", "hooked", "run"]
    assert [launch[0] for launch in compiled.launches] == kinds
    assert compiled.launches[1] == ("hooked", (3, 1, 1), x, x, 64, 256)
