"""`jit`: Triton's, with a launch that costs the host a fraction of its time.

At each launch Triton binds the arguments, derives from them what a kernel is specialised for, looks
the kernel up, and calls the hooks of its profiler, of which there are none as a rule. Here all but
the tensors is fixed for many launches. What a kernel is specialised for in them makes a key, which
leads straight to the compiled kernel; that is given addresses, past Triton's own launcher.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from triton import knobs

# What Triton 3.6 hands to a launcher in C before the kernel's arguments: grid, stream, function,
# cooperative, dependent, two scratches, metadata for the kernel and for hooks, two hooks.
_LAUNCHER = "iiiKKppOOOOOO"


class Kernel:
    """A Triton kernel, first its tensors, then the rest: `kernel.fixed(**rest)(grid, *tensors)`."""

    def __init__(self, function: Callable[..., None], options: dict[str, Any]) -> None:
        self.jitted = triton.jit(**options)(function)
        self.interpreted = not isinstance(self.jitted, triton.JITFunction)
        params = () if self.interpreted else self.jitted.params
        self._names = [param.name for param in params]

    def fixed(self, **constants: Any) -> Callable[..., None]:
        """The kernel with its last arguments, as a function of its grid and of the first ones.

        constants: those arguments and options such as `num_warps`; no launch looks at them again.
        The others are tensors, None, or tuples of these. The key of a compiled kernel tells of them
        more than Triton asks for on NVIDIA's GPUs, never less: device; dtype, kind of device and
        16-byte alignment of each tensor. Triton's own switches (`triton.knobs`) count as they are
        at the first launch. To be kept for many launches, as by `functools.lru_cache`.
        """
        jitted, kept = self.jitted, {}
        if self.interpreted:
            return lambda grid, *args: jitted[grid](*args, **constants)
        rest = [constants[name] for name in self._names if name in constants]
        first = len(self._names) - len(rest)
        assert constants.keys() >= set(self._names[first:]), "constants are the last arguments"
        device_now, stream_of = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

        def launch(grid: tuple[int, ...], *args: Any) -> None:
            """Launch, by the compiled kernel where this key had one before."""
            device = device_now()
            key: list[Hashable] = [device, grid]
            values = _look(args, key)
            found = kept.get(tuple(key))
            if found is None:
                compiled = jitted[grid](*args, **constants)
                kept[tuple(key)] = compiled, (*grid, 1, 1)[:3], *_launcher(compiled)
                return
            compiled, sides, call, kernel = found
            if _is_hooked():
                compiled[sides](*args, *rest)
                return
            call(*sides, stream_of(device), *kernel, *values, *rest)

        return launch


def _look(args: Sequence[Any], key: list[Hashable]) -> list[Any]:
    """What a compiled kernel takes for args: addresses; appends to the key what it depends on."""
    values, bits = [], 0
    for arg in args:
        if arg is None:
            values.append(None)
            key.append(None)
        elif type(arg) is tuple:
            inner: list[Hashable] = []
            values.append(tuple(_look(arg, inner)))
            key.append(tuple(inner))
        else:
            address = arg.data_ptr()
            bits |= address
            values.append(address)
            key.append(arg.dtype)
            key.append(arg.is_cuda)
    if bits & 15:
        key += [value & 15 for value in values if type(value) is int]
    return values


def _launcher(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """A function that launches, and its arguments between the stream and those of the kernel.

    The one in C where Triton's own in Python would only pass the arguments on.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    module = sys.modules.get(type(run).__module__)
    is_known = getattr(module, "_BASE_ARGS_FORMAT", None) == _LAUNCHER
    if not is_known or run.global_scratch_size or run.profile_scratch_size:
        return run, (function, metadata, None, None, None)
    flags = run.launch_cooperative_grid, run.launch_pdl
    return run.launch, (function, *flags, None, None, metadata, None, None, None)


def _is_hooked() -> bool:
    """Whether someone, such as Triton's profiler, wants to know of launches."""
    runtime = knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # one of them is None, or a function by itself
        hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
        return any(getattr(hook, "calls", hook) for hook in hooks)


def jit(**options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator for kernels that Python launches; options: those of `triton.jit`."""
    return lambda function: Kernel(function, options)
