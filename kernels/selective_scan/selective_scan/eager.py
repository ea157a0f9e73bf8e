"""A short way past torch's dispatcher for plain eager calls of a registered op.

A `torch.library` op costs 50 to 100 us of host time in each direction, more than most kernels take
on the device. The registration is for those who look at an op from outside: compilers, fake
tensors, FLOP counters, vmap, tracers. Where none of them watches, `EagerOp` calls the kernel, in a
bare `torch.autograd.Function` where a gradient is wanted. Results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

Kernel = Callable[..., Any]
_Layout = tuple[int | None, ...] | None
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_KNOWN = _PLAIN | {bool, int, float, type(None), torch.dtype}  # nothing that could watch
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def unwatched(args: Sequence[Any]) -> bool:
    """Whether the call is plain: no tracer, mode or transform, and plain tensors only."""
    if torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    kinds = set(map(type, args)) - _KNOWN
    return not any(issubclass(kind, Tensor) for kind in kinds)


class EagerOp:
    """An op with kernels by device; calls take the short way where nothing watches them.

    op: the registered op, for all other calls. kernels: by device type, the functions that compute
    it; they follow the rules of `torch.library.custom_op`: no input is changed or returned.
    cast: what autocast makes of the arguments, where the op has a rule for it.
    """

    def __init__(
        self, op: Callable[..., Any], kernels: dict[str, Kernel], cast: Kernel | None = None
    ) -> None:
        self.op, self.kernels, self.cast = op, kernels, cast
        self._function: type[Function] | None = None

    def differentiate(self, backward: Kernel, setup_context: Kernel) -> None:
        """Backward and setup_context as for `torch.library.register_autograd`.

        In setup_context `ctx.needs_input_grad` has one entry for each tensor of a list, and then
        two that do not count.
        """
        self._function = _function_of(self.kernels, backward, setup_context)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        flat = _flatten(args)
        device = flat[0].device.type
        kernel = self.kernels.get(device)
        if kernel is None or not unwatched(flat):
            return self.op(*args)
        if self.cast is not None and torch.is_autocast_enabled(device):
            args = self.cast(*args)
            flat = _flatten(args)
        if not torch.is_grad_enabled() or not any(_wants_grad(arg) for arg in flat):
            return kernel(*args)
        if self._function is None:
            return self.op(*args)
        form: list[_Layout] = []  # of the output
        output = self._function.apply(*flat, _layout(args), form)
        return _unflatten(output, form[0]) if form else output


class TritonOp(EagerOp):
    """An op that is defined by its CUDA function; the other implementations are added to it.

    A decorator in the place of `torch.library.custom_op`.
    """

    def __init__(self, name: str, cuda: Kernel) -> None:
        definition = torch.library.custom_op(name, cuda, mutates_args=(), device_types="cuda")
        super().__init__(definition, {"cuda": cuda})
        self.definition = definition

    def register_kernel(self, device: str) -> Callable[[Kernel], Kernel]:
        """Decorator: the function is the kernel for tensors of `device`."""

        def register(kernel: Kernel) -> Kernel:
            self.definition.register_kernel(device)(kernel)
            self.kernels[device] = kernel
            return kernel

        return register

    def register_fake(self, fake: Kernel) -> Kernel:
        """Decorator: the function gives shapes and dtypes of the result."""
        self.definition.register_fake(fake)
        return fake

    def register_autograd(self, backward: Kernel, *, setup_context: Kernel) -> None:
        """The gradient, as for `torch.library.CustomOpDef.register_autograd`."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        self.differentiate(backward, setup_context)


def triton_op(name: str) -> Callable[[Kernel], TritonOp]:
    """Decorator: register the function as the op `name` for CUDA tensors."""
    return lambda cuda: TritonOp(name, cuda)


def compiled_kernel(overload: Callable[..., Any]) -> Kernel:
    """A kernel in C++ by its op, called below what Python registered for autograd and autocast."""

    def kernel(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return overload(*args)

    return kernel


def _wants_grad(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad


def _flatten(args: Sequence[Any]) -> Sequence[Any]:
    """The arguments, with lists of tensors taken apart."""
    if list not in map(type, args):
        return args
    flat: list[Any] = []
    for arg in args:
        flat += arg if _is_tensors(arg) else [arg]
    return flat


def _is_tensors(arg: Any) -> bool:
    return type(arg) is list and bool(arg) and isinstance(arg[0], Tensor)


def _layout(args: Sequence[Any]) -> _Layout:
    """Length of each list of tensors and None for other arguments; None where there is no list."""
    if list not in map(type, args):
        return None
    layout = tuple(len(arg) if _is_tensors(arg) else None for arg in args)
    return layout if any(layout) else None


def _unflatten(flat: Sequence[Any], layout: _Layout) -> tuple[Any, ...]:
    """The arguments from which `_flatten` made `flat`."""
    if layout is None:
        return tuple(flat)
    rest = iter(flat)
    return tuple(next(rest) if n is None else [next(rest) for _ in range(n)] for n in layout)


def _function_of(
    kernels: dict[str, Kernel], gradient: Kernel, setup_context: Kernel
) -> type[Function]:
    """The autograd function of an op."""

    class Short(Function):
        """Calls the kernel of the first tensor's device; lists of tensors are taken apart."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *flat, layout, form = inputs
            args = _unflatten(flat, layout)
            output = kernels[flat[0].device.type](*args)
            setup_context(ctx, args, output)
            ctx.layout = layout
            ctx.form = _layout(output) if isinstance(output, tuple) else None
            if ctx.form is None:
                return output
            form.append(ctx.form)
            return tuple(_flatten(output))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = gradient(ctx, *_unflatten(grads, ctx.form))
            found = found if isinstance(found, tuple) else (found,)
            if ctx.layout is not None:
                pairs = zip(ctx.layout, found)
                found = tuple(g for n, grad in pairs for g in ([grad] if n is None else grad))
            return *found, None, None

    return Short
