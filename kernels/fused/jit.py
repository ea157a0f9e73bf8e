"""`jit`: Triton's, with a launch that costs the host a fraction of its time.

At each launch Triton binds the arguments, derives from them what a kernel is specialised for, looks
the kernel up, and calls the hooks of its profiler, of which there are none as a rule. Here a key of
the same facts leads straight to the compiled kernel, which is given addresses for tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

_Compiled = dict[Hashable, tuple[Any, list[Any]]]  # by key: a kernel, the last of its arguments


class Kernel:
    """A Triton kernel, launched as Triton's own: `kernel[grid](*args, **constants)`.

    The key of a compiled kernel tells more than Triton asks for, never less: device; dtype, kind of
    device and 16-byte alignment of a tensor; of an integer its width, whether it is 1 and whether
    16 divides it; the value of a constant and of any keyword; all this of each part of a tuple.
    """

    def __init__(self, function: Callable[..., None], options: dict[str, Any]) -> None:
        self.jitted = triton.jit(**options)(function)
        self.interpreted = not isinstance(self.jitted, triton.JITFunction)
        params = () if self.interpreted else self.jitted.params
        self._names = [param.name for param in params]
        self._constants = frozenset(i for i, param in enumerate(params) if param.is_constexpr)
        self._compiled: _Compiled = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.jitted[grid] if self.interpreted else partial(self._launch, grid)

    def fixed(self, **constants: Any) -> Callable[..., None]:
        """The kernel with these last arguments and constants as a function of grid and the others.

        No launch looks at them again. To be kept for many launches, as by `functools.lru_cache`.
        """
        if self.interpreted:
            return lambda grid, *args: self.jitted[grid](*args, **constants)
        return partial(self._run, {}, constants, ())

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        self._run(self._compiled, constants, tuple(constants.items()), grid, *args)

    def _run(
        self,
        kept: _Compiled,
        constants: dict[str, Any],
        label: tuple,
        grid: tuple[int, ...],
        *args: Any,
    ) -> None:
        """Launch. kept: what is compiled already; label: of the constants, in its keys."""
        device, (facts, values) = torch._C._cuda_getDevice(), _facts(args, self._constants)
        key = device, label, *facts
        found = kept.get(key)
        if found is None:
            compiled, rest = self.jitted[grid](*args, **constants), self._names[len(args) :]
            if all(name in constants for name in rest):  # else some have their default values
                kept[key] = compiled, [constants[name] for name in rest]
            return
        compiled, rest = found
        x, y, z = (*grid, 1, 1)[:3]
        if _is_hooked():
            compiled[x, y, z](*args, *rest)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        kernel = compiled.function, compiled.packed_metadata
        compiled.run(x, y, z, stream, *kernel, None, None, None, *values, *rest)

    def key(self, args: Sequence[Any], constants: dict[str, Any]) -> Hashable:
        """What tells apart the calls for which Triton may compile different kernels."""
        return tuple(constants.items()), *_facts(args, self._constants)[0]


def _facts(
    args: Sequence[Any], constants: frozenset[int] = frozenset()
) -> tuple[list[Hashable], list[Any]]:
    key: list[Hashable] = []
    values = list(args)
    for i, arg in enumerate(args):
        kind = type(arg)
        if isinstance(arg, Tensor):
            values[i] = address = arg.data_ptr()
            key += (arg.dtype, arg.is_cuda, address & 15 == 0)
        elif i in constants or arg is None or kind is bool:
            key += (kind, arg)
        elif kind is int:
            key += (arg.bit_length() >> 5, arg & 15 == 0, arg == 1)
        elif kind is tuple:
            part, inner = _facts(arg)
            key.append(tuple(part))
            values[i] = tuple(inner)
        else:
            key.append(kind)
    return key, values


def _is_hooked() -> bool:
    """Whether someone, such as Triton's profiler, wants to know of launches."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def jit(**options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator for kernels that Python launches; options: those of `triton.jit`."""
    return lambda function: Kernel(function, options)
