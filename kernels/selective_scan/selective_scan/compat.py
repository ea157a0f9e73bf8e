"""Names of other builds of this kernel: code that imports them runs on these kernels, unchanged.

`install()` makes `selective_scan_cuda_oflex` and `selective_scan_cuda_core` importable.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor

from . import library

MODULES = ("selective_scan_cuda_oflex", "selective_scan_cuda_core")


def fwd(  # noqa: PLR0913 - the signature of the other builds
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = False,
) -> list[Tensor]:
    """[y, x] of a scan; shapes as in `selective_scan`, B and C (b, g, n, l), x for `bwd` alone.

    nrows, a tuning hint of the other builds, only has to be positive. y is float32 with
    `out_float`, else of the dtype of u. Raises ValueError for nrows < 1 and RuntimeError where the
    kernels are missing.
    """
    _check(nrows)
    y, _, x = torch.ops.selective_scan.selective_scan_fwd(
        u, delta, A, B, C, D, delta_bias, delta_softplus, False, out_float, True
    )
    return [y, x]


def bwd(  # noqa: PLR0913 - the signature of the other builds
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], the last two None without D or delta_bias.

    dout: (b, d, l), x: what `fwd` returned. Raises as `fwd` does.
    """
    _check(nrows)
    *grads, dD, dbias = torch.ops.selective_scan.selective_scan_bwd(
        dout, None, x, u, delta, A, B, C, D, delta_bias, delta_softplus, False
    )
    return [*grads, None if D is None else dD, None if delta_bias is None else dbias]


def _check(nrows: int) -> None:
    if nrows < 1:
        raise ValueError(f"selective_scan.compat: expected nrows >= 1, got {nrows}")
    if library.LOAD_ERROR is not None:
        raise RuntimeError(
            f"selective_scan.compat: expected the compiled kernels, but {library.LOAD_ERROR}; "
            f"build them: {library.BUILD_COMMAND}"
        )


def install() -> tuple[str, ...]:
    """Put this module's `fwd` and `bwd` behind the names in MODULES, in place of any other build.

    Returns the names. Call it before the code that imports them.
    """
    for name in MODULES:
        module = ModuleType(name, f"{name}: {__name__} under the name of another build.")
        vars(module).update(fwd=fwd, bwd=bwd)
        sys.modules[name] = module
    return MODULES
