"""`fwd` and `bwd` as Mamba's own build has them; see `compat` for what holds of all builds.

Beside those of VMamba they take z, which gates the output: y silu(z); B and C of (d, n), the same
at all positions; and a complex A (d, n), where B and C are complex (d, n) or hold real and
imaginary parts in turn, (b, g, n, 2l), and y is twice the real part of the sum. The kernels have
neither constant nor complex rows, so scans with them run state by state in float32, at several
passes over (b, d, l) each, with one warning; their x is one chunk, which `bwd` does not read.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compat_vmamba as vmamba
from . import library
from .ops import selective_scan


@torch.no_grad()
def fwd(  # noqa: PLR0913 - the signature of the other build
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """[y, x], and y silu(z) where z (b, d, l) is given. Raises as `compat.fwd` does.

    y has the dtype of u, y silu(z) that of z; x is complex where A is.
    """
    vmamba.check_call(u, nrows)
    call = _fwd_by_state if _goes_by_state(u, A, B, C) else vmamba.fwd
    y, x = call(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [y, x] if z is None else [y, x, _gate(y, z)]


@torch.no_grad()
def bwd(  # noqa: PLR0913 - the signature of the other build
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool = False,
    nrows: int = 1,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz with z, then y silu(z) if asked for.

    out, x: the first two that `fwd` returned; dz: where the gradient of z goes, or None. Both `out`
    and dz go with z alone. Raises as `fwd` does, and ValueError for z without `out`.
    """
    vmamba.check_call(u, nrows)
    more: list[Tensor | None] = []
    if z is not None:
        if out is None:
            raise ValueError("selective_scan.compat: expected out, which fwd returned, beside z")
        grad = torch.ops.aten.silu_backward(dout.float() * out, z.float())
        more = [grad.to(z.dtype) if dz is None else dz.copy_(grad)]
        dout = F.silu(z.float()) * dout
    if recompute_out_z:
        more.append(None if z is None else _gate(out, z))
    if _goes_by_state(u, A, B, C):
        grads = _bwd_by_state(u, delta, A, B, C, D, delta_bias, dout, delta_softplus)
    else:
        grads = vmamba.bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus)
    return [*grads, *more]


def _gate(y: Tensor, z: Tensor) -> Tensor:
    return (F.silu(z.float()) * y).to(z.dtype)


def _goes_by_state(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether B or C is constant or A complex. Raises ValueError where their shapes do not fit."""
    if not A.is_complex() and 2 not in (B.dim(), C.dim()):
        return False
    if u.dim() != 3 or A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(
            "selective_scan.compat: expected u (b, d, l) and A (d, n), "
            f"got u {tuple(u.shape)} and A {tuple(A.shape)}"
        )
    (b, d, l), n = u.shape, A.shape[1]
    l = 2 * l if A.is_complex() else l
    for name, x in (("B", B), ("C", C)):
        g = x.shape[1] if x.dim() == 4 else 1
        constant = x.shape == A.shape and x.is_complex() == A.is_complex()
        by_position = x.shape in ((b, n, l), (b, g, n, l)) and g and d % g == 0
        if not constant and (x.is_complex() or not by_position):
            raise ValueError(
                f"selective_scan.compat: expected {name} (d, n) = {tuple(A.shape)} of the dtype of "
                f"A, {A.dtype}, or real (b, n, l) or (b, g, n, l) with l = {l} numbers in a row, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    library.warn_once(
        "selective_scan.compat",
        "B or C is constant or A complex, for which there is no kernel: running state by state in "
        "float32, which is about 7 times slower for real and 40 times for complex parameters",
        stacklevel=5,
    )
    return True


def _fwd_by_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[y, x] of `fwd` as the sum of the scans of single states."""
    wide, dt = u.float(), _step(delta, delta_bias, delta_softplus)
    y = torch.zeros_like(wide) if D is None else D.float()[:, None] * wide
    passed = _spread(dt, u.shape[1]).sum(-1, keepdim=True)  # (b, d, 1)
    pairs = []
    for s in range(A.shape[1]):
        state = _slice(A, B, C, s)
        part, h = _scan_state(wide, dt, *state)
        y += part
        pairs.append(torch.stack((torch.exp(passed * state[0]), h[..., -1:]), -1))
    return [y.to(u.dtype), torch.cat(pairs, -1)]


def _bwd_by_state(  # noqa: PLR0913 - what `bwd` has to hand on
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    delta_softplus: bool,
) -> list[Tensor | None]:
    """The gradients of `_fwd_by_state`, each state scanned again and differentiated by autograd."""
    given = u, delta, A, B, C, D, delta_bias
    u, dout, delta = _leaf(u.float()), dout.float(), _leaf(delta.float())
    bias = None if delta_bias is None else _leaf(delta_bias.float())
    with torch.enable_grad():
        steps = _step(delta, bias, delta_softplus)
    dt, du, ddt = _leaf(steps), torch.zeros_like(u), torch.zeros_like(steps)
    if D is not None:
        du = D.float()[:, None] * dout
    parts = []
    for s in range(A.shape[1]):
        state = [_leaf(x) for x in _slice(A, B, C, s)]
        with torch.enable_grad():
            y, _ = _scan_state(u, dt, *state)
        by_u, by_dt, *part = torch.autograd.grad(y, [u, dt, *state], dout)
        du += by_u
        ddt += by_dt
        parts.append(part)
    dA, dB, dC = (torch.cat(x, 1 if x[0].dim() == 2 else -2) for x in zip(*parts))
    leaves = [delta] if bias is None else [delta, bias]
    ddelta, *dbias = torch.autograd.grad(steps, leaves, ddt)
    dD = None if D is None else (u * dout).sum((0, 2))
    grads = du, ddelta, dA, dB, dC, dD, *(dbias or [None])
    return [None if t is None else g.detach().to(t.dtype) for t, g in zip(given, grads)]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _step(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """What the scan multiplies by, float32."""
    dt = delta.float() if bias is None else delta.float() + bias.float()[:, None]
    return F.softplus(dt) if softplus else dt


def _slice(A: Tensor, B: Tensor, C: Tensor, s: int) -> list[Tensor]:
    """A, B, C of state s: (d, 1), or (b, 1, l) or (b, g, 1, l) where it goes by position."""
    return [x[:, s : s + 1] if x.dim() == 2 else x[..., s : s + 1, :] for x in (A, B, C)]


def _scan_state(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Share in y and values of one state, (b, d, l) each, of what `_slice` gives.

    A complex state turns by dt times the imaginary part of A at each step. Seen from a frame that
    turns with it, it is a pair of real states.
    """
    d = u.shape[1]
    B, C = (_rows(x, d, A.is_complex()) for x in (B, C))
    if not A.is_complex():
        h = _scan_ones(u * B, dt, A)
        return C * h, h
    angle = _spread(dt.double().cumsum(-1), d) * A.imag
    angle = torch.remainder(angle, 2 * math.pi).float()
    turn = torch.complex(angle.cos(), angle.sin())
    drive = u * B * turn.conj()
    real, imaginary = (_scan_ones(x, dt, A.real) for x in (drive.real, drive.imag))
    h = turn * torch.complex(real, imaginary)
    return 2 * (C * h).real, h


def _scan_ones(u: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    ones = u.new_ones(u.shape[0], 1, 1, u.shape[2])
    return selective_scan(u, dt, A, ones, ones)


def _rows(x: Tensor, d: int, is_complex: bool) -> Tensor:
    """B or C of one state as a factor of (b, d, l)."""
    if x.dim() == 2:
        return x
    x = x.float()
    if is_complex:
        x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return _spread(x.flatten(1, -2), d)


def _spread(x: Tensor, d: int) -> Tensor:
    """(b, g, l) to (b, d, l), each row to its d / g channels; (b, 1, l) as it is."""
    return x if x.shape[1] in (1, d) else x.repeat_interleave(d // x.shape[1], 1)
