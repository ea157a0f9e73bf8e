"""The route scan as an op: which implementation runs, and what torch.library has to know of it.

The schemas and the CPU and CUDA kernels are in csrc/route*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import library
from .checks import check_route_scan
from .eager import EagerOp, compiled_kernel
from .reference import route_scan_ref

_FORWARD, _BACKWARD = "route_scan_fwd", "route_scan_bwd"
_CHUNK = 64  # kChunk in csrc/route.h
_ROWS, _MAX_RANK = 16, 48  # kRows and 8 kMaxTiles in csrc/lane.cuh
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = library.kernels_for(_FORWARD)


def route_scan(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    tables: Tensor,
    select: Tensor,
    reverse: Sequence[bool],
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of k selective scans over the tokens of an image, each along a route of its own.

    x: (b, l, d) tokens. proj: (b, l, k, r + 2n), per token and route the numbers [dt, B, C].
    dt_weight: (k, d, r), dt_bias: (k, d), A: (k, d, n) negative, D: (k, d).
    tables: (t, l) integer, row i lists the token at each position of order i, a permutation.
    select: (b, k) or (1, k) integer, the row that a route of an image follows. reverse: k flags,
    walk the row backwards. Or select (b, k / 2) or (1, k / 2) and the flags of k / 2 routes
    forwards, then k / 2 backwards: routes i and i + k / 2 then follow the row of column i, and are
    walked together where x is float16 or bfloat16 with one state, d a multiple of 8, r <= 48 and
    the same output dtype, on CUDA; that is the fastest form.
    delta = softplus(dt_weight dt + dt_bias).
    x and proj share float32, float16 or bfloat16 (autocast widens them to the wider); state and
    sums are float32, and two runs give equal bits. float64 runs the reference.
    The entries of tables and select are not checked, which would wait for the device.
    Returns y (b, l, d) in token order, in `out_dtype`: float32 (default) or the dtype of x.
    Raises ValueError for shapes and dtypes that do not fit, RuntimeError without a kernel.
    """
    check_route_scan(x, proj, dt_weight, dt_bias, A, D, tables, select, reverse)
    full = torch.promote_types(x.dtype, torch.float32)
    if out_dtype not in (None, full, x.dtype):
        raise ValueError(
            f"route_scan: expected out_dtype {full} or the dtype of x, {x.dtype}, got {out_dtype}"
        )
    flags = [bool(flag) for flag in reverse]
    inputs = x, proj, dt_weight, dt_bias, A, D, tables, select
    if not library.use_kernel("route_scan", x, KERNELS):
        return route_scan_ref(*inputs, flags).to(out_dtype or full)
    if not torch.is_autocast_enabled(x.device.type):
        _check_dtypes(x, proj)
    y = route_scan_fwd(*inputs, reverse_bits(flags), out_dtype in (None, full))[0]
    return y.to(out_dtype or full)  # a copy only where autocast widened x


def reverse_bits(reverse: Sequence[bool]) -> int:
    """The flags as the ops take them: bit i is that of route i."""
    return sum(bool(flag) << i for i, flag in enumerate(reverse))


def _check_dtypes(x: Tensor, proj: Tensor) -> None:
    if x.dtype not in _DTYPES or proj.dtype != x.dtype:
        raise ValueError(
            "route_scan: expected x and proj of one dtype among float32, float16 and bfloat16, "
            f"got x {x.dtype} and proj {proj.dtype}; convert one of them"
        )


def _forward_fake(
    x, proj, dt_weight, dt_bias, A, D, tables, select, reverse, out_float
) -> tuple[Tensor, Tensor]:
    flags = [bool(reverse >> i & 1) for i in range(dt_weight.shape[0])]
    check_route_scan(x, proj, dt_weight, dt_bias, A, D, tables, select, flags)
    _check_dtypes(x, proj)
    b, l, d = x.shape
    n = A.shape[2]
    states = x.new_empty(_states_shape(x, dt_weight, n, select, out_float), dtype=torch.float32)
    return x.new_empty((b, l, d), dtype=torch.float32 if out_float else x.dtype), states


def _states_shape(x, dt_weight, n, select, out_float) -> tuple[int, ...]:
    """Shape of the states kept for the backward pass; `takes_lanes` in csrc has the same rule."""
    b, l, d = x.shape
    k, _, r = dt_weight.shape
    in_half = x.dtype != torch.float32 and not out_float
    if x.is_cuda and in_half and select.shape[1] != k and n == 1 and d % 8 == 0 and r <= _MAX_RANK:
        return b, k, -(-l // _ROWS), d
    return b, k, max(-(-l // _CHUNK) - 1, 0), n, d


def _backward_fake(
    dy, x, proj, dt_weight, dt_bias, A, D, tables, select, states, reverse
) -> tuple[Tensor, ...]:
    parameters = (x.new_empty(t.shape, dtype=torch.float32) for t in (dt_weight, dt_bias, A, D))
    return x.new_empty(x.shape), proj.new_empty(proj.shape), *parameters


def _setup_context(ctx, inputs, output) -> None:
    *tensors, reverse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.reverse = reverse
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dy, dstates) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    dx, dproj, *parameters = route_scan_bwd(dy, *tensors, ctx.reverse)
    given = tensors[2:6]
    parameters = [grad.to(tensor.dtype) for grad, tensor in zip(parameters, given)]
    return dx, dproj, *parameters, None, None, None, None


def _widest(x, proj, dt_weight, dt_bias, A, D, *rest) -> tuple:
    """Autocast: x and proj in the wider dtype of the two, the parameters in float32."""
    dtype = torch.promote_types(x.dtype, proj.dtype)
    parameters = (tensor.float() for tensor in (dt_weight, dt_bias, A, D))
    return x.to(dtype), proj.to(dtype), *parameters, *rest


def _forward_flops(x_shape, proj_shape, weight_shape, bias_shape, A_shape, *args, **kwargs) -> int:
    """k b l d (9n + 1) for the scans, as in selective_scan, and 2 k b l d r to expand dt."""
    b, l, d = x_shape
    k, _, r = weight_shape
    return k * b * l * d * (9 * A_shape[2] + 1 + 2 * r)


def _backward_flops(dy_shape, *shapes, **kwargs) -> int:
    """Twice the forward pass, as FlopCounterMode counts other ops."""
    return 2 * _forward_flops(*shapes)


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
    register_flop_formula(ops.route_scan_fwd)(_forward_flops)
    register_flop_formula(ops.route_scan_bwd)(_backward_flops)


def _eager_op(name: str, cast: Callable[..., tuple] | None = None) -> EagerOp:
    op = getattr(torch.ops.selective_scan, name)
    return EagerOp(op, dict.fromkeys(KERNELS, compiled_kernel(op.default)), cast)


if KERNELS:
    _register()
    route_scan_fwd, route_scan_bwd = _eager_op(_FORWARD, _widest), _eager_op(_BACKWARD)
    route_scan_fwd.differentiate(_backward, _setup_context)
