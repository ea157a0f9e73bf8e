"""Names of other builds of this kernel: code that imports them runs on these kernels, unchanged.

`install()` makes them importable. In all of them `fwd` returns a list that starts with y and x, and
`bwd` takes that x. x is (b, d, chunks, 2n) in float32: per chunk and state the product of the
decays since the start of the row, then the state, both after the chunk. So `x[:, :, -1, 1::2]` is
the last state (b, d, n). A chunk has 128 positions where u, delta, B and C are float32 and 256
where they are 16 bit; other builds take 2048.

As in the other builds, nothing here records a graph: autograd sees the caller's own function alone.
u, delta, B and C may differ in dtype; the scan then runs in the widest. Every gradient has the
shape and the dtype of its tensor.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import compat_mamba
from .compat_vmamba import bwd, fwd

__all__ = ["MODULES", "bwd", "fwd", "install", "uninstall"]

_MAMBA = {"fwd": compat_mamba.fwd, "bwd": compat_mamba.bwd}
_VMAMBA = {"fwd": fwd, "bwd": bwd}
_BUILDS = {
    "selective_scan_cuda": _MAMBA,
    "selective_scan_cuda_test": _MAMBA,
    "selective_scan_cuda_oflex": _VMAMBA,
    "selective_scan_cuda_core": _VMAMBA,
    "selective_scan_cuda_ndstate": _VMAMBA,
    "selective_scan_cuda_nrow": _VMAMBA,
}
MODULES = tuple(_BUILDS)


def install(*names: str) -> tuple[str, ...]:
    """Make these names of other builds, by default all of MODULES, mean the kernels here.

    Call it in every process before the code that imports them: a build of that name that is
    installed is then not imported, and one that was imported before is replaced, with a warning,
    for what imports it from now on. Returns the names. Raises ValueError for a name not in MODULES.
    """
    names = names or MODULES
    unknown = sorted(set(names) - set(MODULES))
    if unknown:
        raise ValueError(
            f"selective_scan.compat: expected names among {', '.join(MODULES)}, "
            f"got {', '.join(unknown)}"
        )
    held = [name for name in names if sys.modules.get(name) and not _is_ours(name)]
    if held:
        warnings.warn(
            f"selective_scan.compat: {', '.join(held)} of another build was imported before; code "
            "that holds it goes on with that build. Call install() earlier",
            RuntimeWarning,
            stacklevel=2,
        )
    for name in names:
        module = ModuleType(name, f"{name}: {__name__} under the name of another build.")
        module.__spec__ = ModuleSpec(name, None, origin=__file__)
        vars(module).update(_BUILDS[name])
        sys.modules[name] = module
    return names


def uninstall() -> None:
    """Give the names back: what imports them from now on gets an installed build, if any."""
    for name in MODULES:
        if _is_ours(name):
            del sys.modules[name]


def _is_ours(name: str) -> bool:
    module = sys.modules.get(name)
    return getattr(module, "fwd", None) is _BUILDS[name]["fwd"]
