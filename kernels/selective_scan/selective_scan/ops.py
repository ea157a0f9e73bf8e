"""The public ops, and what torch.library has to know of `selective_scan`.

The schemas and the CPU and CUDA kernels are in csrc/selective_scan*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import library
from .checks import check_scan_dtypes, check_selective_scan
from .reference import selective_scan_ref
from .route_ops import route_scan

__all__ = ["route_scan", "selective_scan"]

_FORWARD, _BACKWARD = "selective_scan_fwd", "selective_scan_bwd"
KERNELS = library.kernels_for(_FORWARD)
Shape = Sequence[int]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    reverse: bool = False,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of the rows of u, on the kernel of its device.

    u: (b, d, l). A: (d, n), negative, n <= 256. B, C: (b, g, n, l) or (b, n, l), d a multiple of g.
    D: (d). delta: (b, d, l) and delta_bias: (d), or (b, d / r, l) and (d / r): then r neighbouring
    channels share a row of delta. u, delta, B and C share float32, float16 or bfloat16 (autocast
    widens them to the widest among them); state and sums are float32. float64 runs the reference.
    `reverse` scans from the last position to the first.
    Returns y (b, d, l) in `out_dtype`, float32 or (default) the dtype of u, and with
    `return_last_state` also the state (b, d, n) in float32.
    Raises ValueError for shapes or dtypes that do not fit, RuntimeError for a device without a
    kernel. Gradients flow to every tensor, also from the last state, and are equal bit for bit
    from run to run.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    check_selective_scan(u, delta, A, B, C, D, None, delta_bias)
    if not library.use_kernel("selective_scan", u, KERNELS):
        return selective_scan_ref(
            u,
            delta,
            A,
            B,
            C,
            D,
            None,
            delta_bias,
            delta_softplus,
            return_last_state,
            reverse=reverse,
            chunked=True,
            out_dtype=out_dtype,
        )
    if out_dtype not in (None, u.dtype, torch.float32):
        raise ValueError(
            f"selective_scan: expected out_dtype float32 or {u.dtype}, got {out_dtype}"
        )
    if u.is_meta or not torch.is_autocast_enabled(u.device.type):
        check_scan_dtypes(u, delta, B, C)
    inputs = [t for t in (u, delta, A, B, C, D, delta_bias) if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    out_float = out_dtype == torch.float32
    y, last, _ = torch.ops.selective_scan.selective_scan_fwd(
        u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, out_float, int(save)
    )
    return (y, last) if return_last_state else y


def count_chunks(u: Tensor) -> int:
    """Chunks in a row of u, (b, d, l); `chunk_length` in csrc has the same rule."""
    return -(-u.shape[2] // (128 if u.dtype == torch.float32 else 256))


def _forward_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    out_float: bool,
    keep_states: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_selective_scan(u, delta, A, B, C, D, None, delta_bias)
    check_scan_dtypes(u, delta, B, C)
    b, d, l = u.shape
    n = A.shape[1]
    y = u.new_empty(b, d, l, dtype=torch.float32 if out_float else u.dtype)
    last = u.new_empty(b, d, n, dtype=torch.float32)
    shape = (b, d, count_chunks(u), keep_states * n) if keep_states else (0,)
    return y, last, u.new_empty(shape, dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    def float32(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    return (
        u.new_empty(u.shape),
        delta.new_empty(delta.shape),
        float32(*A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        float32(0 if D is None else u.shape[1]),
        float32(0 if delta_bias is None else delta.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, softplus, reverse, _, keep_states = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.flags = softplus, reverse, keep_states
    ctx.save_for_backward(output[2], *tensors)


def _backward(
    ctx: Any, dy: Tensor | None, dlast: Tensor | None, dstates: None
) -> tuple[Tensor | None, ...]:
    states, u, delta, A, B, C, D, bias = ctx.saved_tensors
    softplus, reverse, kept = ctx.flags
    if kept != 1:
        raise RuntimeError(
            "selective_scan: expected keep_states=1 in a forward call that is differentiated, "
            f"got {kept}"
        )
    dy = torch.zeros_like(u) if dy is None else dy
    du, ddelta, dA, dB, dC, dD, dbias = torch.ops.selective_scan.selective_scan_bwd(
        dy, dlast, states, u, delta, A, B, C, D, bias, softplus, reverse
    )
    dD = None if D is None else dD.to(D.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return du, ddelta, dA.to(A.dtype), dB, dC, dD, dbias, None, None, None, None


def _widest(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *flags: int,
) -> tuple:
    """Autocast: u, delta, B and C in the widest dtype among them, the parameters in float32."""
    dtype = u.dtype
    for tensor in (delta, B, C):
        dtype = torch.promote_types(dtype, tensor.dtype)
    u, delta, B, C = (tensor.to(dtype) for tensor in (u, delta, B, C))
    D = None if D is None else D.float()
    delta_bias = None if delta_bias is None else delta_bias.float()
    return u, delta, A.float(), B, C, D, delta_bias, *flags


def _forward_flops(
    u_shape: Shape, delta_shape: Shape, A_shape: Shape, *args: Any, **kwargs: Any
) -> int:
    """9 b l d n + b l d, the convention of the published numbers of this family of models."""
    b, d, l = u_shape
    return 9 * b * l * d * A_shape[1] + b * l * d


def _backward_flops(
    dy_shape: Shape,
    dlast: Shape | None,
    states: Shape,
    u_shape: Shape,
    delta_shape: Shape,
    A_shape: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Twice the forward pass, as FlopCounterMode counts other ops."""
    return 2 * _forward_flops(u_shape, delta_shape, A_shape)


def _register() -> None:
    ops, lib = torch.ops.selective_scan, library._fragment
    torch.library.register_fake(f"selective_scan::{_FORWARD}", _forward_fake, lib=lib)
    torch.library.register_fake(f"selective_scan::{_BACKWARD}", _backward_fake, lib=lib)
    torch.library.register_autograd(
        f"selective_scan::{_FORWARD}", _backward, setup_context=_setup_context, lib=lib
    )
    library.refuse_double_backward(_BACKWARD)
    library.register_autocast_rule(_FORWARD, _widest)
    for op in (_FORWARD, _BACKWARD):
        library.refuse_vmap(op)
    register_flop_formula(ops.selective_scan_fwd)(_forward_flops)
    register_flop_formula(ops.selective_scan_bwd)(_backward_flops)


if library.LOAD_ERROR is None:
    _register()
