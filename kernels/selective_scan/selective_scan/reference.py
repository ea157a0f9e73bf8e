"""Selective scan in plain PyTorch: the definition that every kernel is compared with.

For each channel d with n states, over positions t of a sequence (QuadMamba paper, section 3; Mamba,
Algorithm 2):

    delta_t = softplus(delta_t + delta_bias)
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t
    y_t     = C_t . h_t + D u_t

State and sums are float32, or float64 where an input is float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_route_scan, check_selective_scan


def linear_recurrence(a: Tensor, b: Tensor, dim: int = 1) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along `dim` with h_{-1} = 0, in about 2·sqrt(l) vectorised steps.

    The sequence is cut into chunks; all chunks advance together, then the chunk states are chained.
    Only products of decays are formed, never a quotient, so a decay that underflows to zero is as
    good as any other.
    a, b: equal shapes and dtypes. Once differentiable.
    """
    if a.shape != b.shape:
        raise ValueError(
            "linear_recurrence: expected a and b of one shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return _LinearRecurrence.apply(a, b, dim % a.dim())


class _LinearRecurrence(torch.autograd.Function):
    """The adjoint is the same recurrence run backwards: g_t = dh_t + a_{t+1} g_{t+1}."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dim: int) -> Tensor:
        h = _scan_chunks(a, b, dim)
        ctx.save_for_backward(a, h)
        ctx.dim = dim
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, h = ctx.saved_tensors
        dim, l = ctx.dim, a.shape[ctx.dim]
        last = torch.zeros_like(a.narrow(dim, 0, min(l, 1)))
        a_next = torch.cat([a.narrow(dim, 1, max(l - 1, 0)), last], dim)
        g = _scan_chunks(a_next.flip(dim), grad.flip(dim), dim).flip(dim)
        h_prev = torch.cat([last, h.narrow(dim, 0, max(l - 1, 0))], dim)
        return g * h_prev, g, None


def _scan_chunks(a: Tensor, b: Tensor, dim: int) -> Tensor:
    shape, l = a.shape, a.shape[dim]
    steps = max(1, round(l**0.5))
    pad = -l % steps
    outer, inner = shape[:dim].numel(), shape[dim + 1 :].numel()
    chunks = (l + pad) // steps
    a, b = (
        F.pad(x.reshape(outer, l, inner), (0, 0, 0, pad)).view(outer, chunks, steps, inner)
        for x in (a, b)
    )
    h, decay = torch.empty_like(b), torch.empty_like(a)  # (outer, chunks, steps, inner)
    h[:, :, 0], decay[:, :, 0] = b[:, :, 0], a[:, :, 0]
    for t in range(1, steps):
        torch.addcmul(b[:, :, t], a[:, :, t], h[:, :, t - 1], out=h[:, :, t])
        torch.mul(a[:, :, t], decay[:, :, t - 1], out=decay[:, :, t])
    carry = torch.zeros_like(h[:, :, 0])  # (outer, chunks, inner): the state that enters each chunk
    for m in range(1, h.shape[1]):
        torch.addcmul(h[:, m - 1, -1], decay[:, m - 1, -1], carry[:, m - 1], out=carry[:, m])
    h.addcmul_(decay, carry[:, :, None])
    return h.view(outer, l + pad, inner)[:, :l].reshape(shape)


def sequential_recurrence(a: Tensor, b: Tensor, dim: int = 1) -> Tensor:
    """`linear_recurrence` step by step, differentiable any number of times: slow, beyond doubt."""
    h, states = a.new_zeros(()), []
    for a_t, b_t in zip(a.unbind(dim), b.unbind(dim)):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, dim) if states else torch.zeros_like(a)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    chunked: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan in the layout of Mamba's `selective_scan_fn`, with grouped B and C.

    u, z: (b, d, l). A: (d, n), negative. B, C: (b, g, n, l) or (b, n, l), d a multiple of g.
    D: (d). delta: (b, d, l) and delta_bias: (d), or (b, d / r, l) and (d / r): then r neighbouring
    channels share a row of delta.
    `reverse` scans from the last position to the first; the last state is then the one after
    position 0.
    `chunked` takes `linear_recurrence` instead of the step-by-step loop.
    Returns y (b, d, l) in `out_dtype` (or that of u), times silu(z) where z is given, and with
    `return_last_state` also the state (b, d, n) in float32 (float64 for float64 input).
    Raises ValueError for shapes that do not fit.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    check_selective_scan(u, delta, A, B, C, D, z, delta_bias)
    dtype = torch.promote_types(u.dtype, torch.float32)
    group = u.shape[1] // max(B.shape[1], 1)
    x, dt = u.to(dtype), delta.to(dtype)
    dt = dt if delta_bias is None else dt + delta_bias.to(dtype)[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    if dt.shape[1] != u.shape[1]:
        dt = dt.repeat_interleave(u.shape[1] // dt.shape[1], dim=1)
    B, C = (
        m.to(dtype).repeat_interleave(group, dim=1).transpose(2, 3) for m in (B, C)
    )  # (b, d, l, n)
    decay = torch.exp(dt[..., None] * A.to(dtype)[:, None])  # (b, d, l, n)
    drive = (dt * x)[..., None] * B
    if reverse:
        decay, drive = decay.flip(2), drive.flip(2)
    h = (linear_recurrence if chunked else sequential_recurrence)(decay, drive, 2)
    last = h[:, :, -1] if h.shape[2] else h.new_zeros(h.shape[0], h.shape[1], h.shape[3])
    y = ((h.flip(2) if reverse else h) * C).sum(-1)
    y = y if D is None else y + D.to(dtype)[:, None] * x
    y = y if z is None else y * F.silu(z.to(dtype))
    y = y.to(u.dtype if out_dtype is None else out_dtype)
    return (y, last) if return_last_state else y


def route_scan_ref(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    tables: Tensor,
    select: Tensor,
    reverse: list[bool],
    *,
    chunked: bool = True,
) -> Tensor:
    """Sum of k selective scans over the tokens of an image, each along a route of its own.

    x: (b, l, d) tokens, token-major. proj: (b, l, k, r + 2n), per token and route the numbers
    [dt, B, C], taken in token order.
    dt_weight: (k, d, r), dt_bias: (k, d), A: (k, d, n) negative, D: (k, d).
    tables: (t, l) integer, row i lists the token at each position of order i; every row is a
    permutation.
    select: (b, k) or (1, k) integer, the row that route k of an image follows; with k / 2 columns
    routes i and i + k / 2 follow the row of column i.
    reverse: k flags, walk the row backwards. delta = softplus(dt_weight dt + dt_bias).
    Returns y (b, l, d) in token order, float32 (float64 for float64 x).
    Raises ValueError for shapes that do not fit.
    """
    check_route_scan(x, proj, dt_weight, dt_bias, A, D, tables, select, reverse)
    b, l, d = x.shape
    k, _, r = dt_weight.shape
    n = A.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = tables.long()[select.long()].repeat(1, k // select.shape[1], 1).expand(b, k, l)
    route = torch.stack(
        [rows[:, i].flip(1) if reverse[i] else rows[:, i] for i in range(k)], 2
    )  # (b, l, k)
    scan = linear_recurrence if chunked else sequential_recurrence

    xs = x.to(dtype).gather(1, route.reshape(b, l * k, 1).expand(-1, -1, d)).view(b, l, k, d)
    ps = proj.to(dtype).gather(1, route[..., None].expand_as(proj))  # (b, l, k, r + 2n)
    dt, B, C = ps.split([r, n, n], dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        delta = torch.einsum("blkr,kdr->blkd", dt, dt_weight.to(dtype))
    delta = F.softplus(delta + dt_bias.to(dtype))
    decay = torch.exp(delta[..., None] * A.to(dtype))  # (b, l, k, d, n)
    drive = (delta * xs)[..., None] * B[:, :, :, None]
    h = scan(decay, drive, 1)
    ys = (h * C[:, :, :, None]).sum(-1) + D.to(dtype) * xs  # (b, l, k, d)
    place = route.reshape(b, l * k, 1).expand(-1, -1, d)
    return torch.zeros_like(x, dtype=dtype).scatter_add(1, place, ys.reshape(b, l * k, d))
