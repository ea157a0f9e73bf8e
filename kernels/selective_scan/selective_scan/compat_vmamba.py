"""`fwd` and `bwd` as VMamba's builds have them; see `compat` for what holds of all builds."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .checks import check_selective_scan
from .ops import KERNELS, count_chunks

_PAIRS = 2  # of `Keep` in csrc/selective_scan.h: decays and states in turn


@torch.no_grad()
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
    """[y, x] of a scan, by the signature of VMamba's builds.

    Shapes as in `selective_scan`; for one state also A (d) with B and C (b, g, l). nrows, a tuning
    hint of the other builds, only has to be positive. y (b, d, l) is float32 with `out_float`, else
    of the dtype of u. Raises ValueError for shapes and values that do not fit and RuntimeError
    where the kernels are missing.
    """
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, nrows)
    y, _, x = torch.ops.selective_scan.selective_scan_fwd(
        *inputs, delta_softplus, False, out_float, keep_states=_PAIRS
    )
    return [y if out_float else y.to(u.dtype), x]


@torch.no_grad()
def bwd(  # noqa: PLR0913 - the signature of the other builds
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], the last two None without D or delta_bias.

    dout: (b, d, l). x: what `fwd` returned, or None: then the states are computed again. Raises as
    `fwd` does.
    """
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, nrows)
    if x is None:
        x = fwd(u, delta, A, B, C, D, delta_bias, delta_softplus)[1]
    if dout.dtype != inputs[0].dtype:
        dout = dout.float()
    states = _entering_states(x, inputs[0], inputs[2].shape[1])
    grads = torch.ops.selective_scan.selective_scan_bwd(
        dout, None, states, *inputs, delta_softplus, False
    )
    given = u, delta, A, B, C, D, delta_bias
    return [None if t is None else g.view(t.shape).to(t.dtype) for t, g in zip(given, grads)]


def _inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    nrows: int,
) -> tuple:
    """The tensors as the ops take them: B and C (b, g, n, l), u, delta, B and C of one dtype."""
    check_call(u, nrows)
    if A.is_complex():
        raise ValueError(f"selective_scan.compat: expected a real A, got {A.dtype}")
    if A.dim() == 1:
        A, B, C = A[:, None], B.unsqueeze(2), C.unsqueeze(2)
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    check_selective_scan(u, delta, A, B, C, D, None, delta_bias)
    wide = reduce(torch.promote_types, (x.dtype for x in (u, delta, B, C)))
    u, delta, B, C = (x.to(wide) for x in (u, delta, B, C))
    return u, delta, A, B, C, D, delta_bias


def check_call(u: Tensor, nrows: int) -> None:
    """Raise ValueError for nrows < 1 or a dtype without a kernel, RuntimeError without kernels."""
    if nrows < 1:
        raise ValueError(f"selective_scan.compat: expected nrows >= 1, got {nrows}")
    why = library.missing("selective_scan_fwd", "keep_states")
    if why is None and u.device.type not in (*KERNELS, "meta"):
        why = f"{library.PATH} holds none for a {u.device.type} tensor"
    if why is not None:
        raise RuntimeError(
            f"selective_scan.compat: expected the compiled kernels, but {why}; "
            f"build them: {library.BUILD_COMMAND}"
        )
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            "selective_scan.compat: expected u in float32, float16 or bfloat16, got "
            f"{u.dtype}; convert it"
        )


def _entering_states(x: Tensor, u: Tensor, n: int) -> Tensor:
    """The states that enter the chunks, (b, d, chunks, n), from the pairs after them."""
    shape = (*u.shape[:2], count_chunks(u), 2 * n)
    if x.shape != shape:
        raise ValueError(
            "selective_scan.compat: expected x as fwd returned it for these inputs, of shape "
            f"(b, d, chunks, 2n) = {shape}, got {tuple(x.shape)}"
        )
    return F.pad(x[..., 1::2], (0, 0, 1, -1))
