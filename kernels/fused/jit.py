"""`jit`: Triton's, with a launch that costs the host half of its time.

At each launch Triton binds the arguments, derives from them what a kernel is specialised for, and
looks the kernel up. Here a key of the same facts leads straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import triton


class Kernel:
    """A Triton kernel, launched as Triton's own: `kernel[grid](*args, **constants)`.

    The key of a compiled kernel tells more than Triton asks for, never less: device; dtype and
    16-byte alignment of a tensor; of an integer its width, whether it is 1 and whether 16 divides
    it; the value of a constant and of any keyword; all this of each part of a tuple.
    """

    def __init__(self, function: Callable[..., None], options: dict[str, Any]) -> None:
        self.jitted = triton.jit(**options)(function)
        self.interpreted = not isinstance(self.jitted, triton.JITFunction)
        params = () if self.interpreted else self.jitted.params
        self._names = [param.name for param in params]
        self._constants = frozenset(i for i, param in enumerate(params) if param.is_constexpr)
        self._compiled: dict[Hashable, tuple[Any, list[str]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.jitted[grid] if self.interpreted else partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        key = torch.cuda.current_device(), *self.key(args, constants)
        found = self._compiled.get(key)
        if found is None:
            compiled, rest = self.jitted[grid](*args, **constants), self._names[len(args) :]
            if all(name in constants for name in rest):  # else some have their default values
                self._compiled[key] = compiled, rest
            return
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*args, *[constants[name] for name in rest])

    def key(self, args: Sequence[Any], constants: dict[str, Any]) -> tuple[Hashable, ...]:
        """What tells apart the calls for which Triton may compile different kernels."""
        return tuple(_facts(args, self._constants)), tuple(constants.items())


def _facts(args: Sequence[Any], constants: frozenset[int] = frozenset()) -> list[Hashable]:
    key: list[Hashable] = []
    for i, arg in enumerate(args):
        kind = type(arg)
        if i in constants or arg is None or kind is bool:
            key += (kind, arg)
        elif kind is int:
            key += (arg.bit_length() >> 5, arg % 16 == 0, arg == 1)
        elif kind is float:
            key.append(kind)
        elif kind is tuple:
            key.append(tuple(_facts(arg)))
        else:
            key += (arg.dtype, arg.data_ptr() % 16 == 0)
    return key


def jit(**options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator for kernels that Python launches; options: those of `triton.jit`."""
    return lambda function: Kernel(function, options)
