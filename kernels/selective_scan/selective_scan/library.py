"""The compiled kernels: loading them, what they offer, and what to say where they are missing."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
PATH = HERE / "_C.so"
BUILD_COMMAND = "pip install --no-build-isolation ./kernels/selective_scan"
NAMESPACE = "selective_scan"

_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")  # keeps Python registrations alive
_warned: set[str] = set()


def version_at(folder: Path) -> str:
    """The version of the copy of this package in `folder`."""
    file = folder / "VERSION"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "of unknown version"


def installed() -> Path | None:
    """The folder of the copy that `import selective_scan` takes, if there is one."""
    spec = importlib.util.find_spec("selective_scan")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def _load() -> str | None:
    """Load the library. None, or why it is not there."""
    if not PATH.exists():
        reason, other = f"{PATH} does not exist (not built)", installed()
        if other not in (None, HERE):
            reason += f"; the copy in {other} is {version_at(other)}, not {version_at(HERE)}"
        return reason
    if hasattr(getattr(torch.ops, NAMESPACE), "selective_scan_fwd"):
        return f"the ops were already loaded from another copy than {PATH}"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"{PATH} does not load: {error}"
    return None


LOAD_ERROR = _load()


def missing(op: str, argument: str | None = None) -> str | None:
    """Why `op`, or this argument of it, is not in the loaded library; None where it is there."""
    if LOAD_ERROR is not None:
        return LOAD_ERROR
    found, what = getattr(getattr(torch.ops, NAMESPACE), op, None), op
    if found is not None and argument is not None:
        names = [item.name for item in found.default._schema.arguments]
        found, what = argument in names or None, f"the {argument} of {op}"
    return f"{PATH} lacks {what}: it was built from older sources" if found is None else None


def kernels_for(op: str) -> frozenset[str]:
    """Device types ("cpu", "cuda") for which the loaded library holds a kernel of `op`."""
    name = f"{NAMESPACE}::{op}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if missing(op) is not None:
        return frozenset()
    return frozenset(device for device in ("cpu", "cuda") if has(name, device.upper()))


def use_kernel(op: str, tensor: Tensor, kernels: frozenset[str]) -> bool:
    """Whether `op` runs as a kernel on this tensor; False means the PyTorch reference.

    float64 always takes the reference, which is the definition. A CPU tensor takes it with one
    warning where no kernel was built. Raises RuntimeError for another device without a kernel.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64:
        return False
    if device in kernels or device == "meta" and kernels:
        return True
    if device not in ("cpu", "meta"):
        why = missing(f"{op}_fwd") or f"{PATH} holds kernels for {', '.join(sorted(kernels))} only"
        raise RuntimeError(
            f"{op}: expected a compiled kernel for a {device} tensor, but {why}. "
            f"Build it where nvcc is installed: {BUILD_COMMAND}. `python -m selective_scan.doctor` "
            f"says what is missing; `{op}_ref` is the slow definition in plain PyTorch"
        )
    warn_once(
        op,
        f"no compiled CPU kernel ({missing(f'{op}_fwd')}), running the PyTorch reference, which "
        f"is several times slower. Build it: {BUILD_COMMAND}",
    )
    return False


def warn_once(name: str, message: str, stacklevel: int = 4) -> None:
    """A RuntimeWarning, once per process and name; stacklevel as in `warnings.warn`."""
    if name not in _warned and not torch.compiler.is_compiling():
        _warned.add(name)
        warnings.warn(f"{name}: {message}", RuntimeWarning, stacklevel)


def register_autocast_rule(op: str, rule: Callable[..., tuple]) -> None:
    """Under autocast, call `op` with `rule(*args)` and autocast off."""
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def cast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*rule(*args))

    for key in (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA):
        overload.py_impl(key)(cast)
        _fragment.impl(op, cast, key.name)


def refuse_vmap(op: str) -> None:
    """Make torch.vmap over `op` an error that says what to do instead."""

    def refuse(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError(
            f"{op}: expected a call outside torch.vmap, got one inside; the op takes a batch "
            "dimension, so put the mapped dimension there"
        )

    torch.library.register_vmap(f"{NAMESPACE}::{op}", refuse, lib=_fragment)


def refuse_double_backward(op: str) -> None:
    """Make differentiating the backward op an error instead of a silent zero."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op}: expected a first derivative only, got a request for a second one; "
            "use the reference in float64 for that"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{op}", refuse, lib=_fragment)
