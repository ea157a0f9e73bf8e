"""The scan over the quadtree sequence, without ever writing that sequence.

With the nested order a one-hot decision makes the sequence a permutation of the tokens, so the scan
reads and writes them through index tables. The gradient of the decision, which an index alone would
drop, is computed in the backward pass from the tensors that are there anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadmamba.kernels import selective_scan
from quadmamba.kernels.dispatch import EagerOp
from quadmamba.kernels.quadtree_gather import decision_grad
from quadmamba.kernels.quadtree_gather.checks import check_gather
from quadmamba.kernels.quadtree_scan.reference import quadtree_scan_ref

_REVERSE = [False, True]  # route 0 forwards, route 1 backwards
_REVERSE_BITS = selective_scan.route_ops.reverse_bits(_REVERSE)


def quadtree_scan(
    x: Tensor,
    proj: Tensor,
    decision: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    maps: tuple[Tensor, Tensor, Tensor],
    tables: Tensor | None,
) -> Tensor:
    """Forward and backward scan over the quadtree sequence, tokens (b, l, d) -> (b, l, d).

    proj: (b, l, 2, r + 2n), the numbers [dt, B, C] of each token. decision: (b, 4), one-hot up to
    its gradient. parameters: dt_weight (2, d, r), dt_bias (2, d), A (2, d, n), D (2, d). maps:
    fine, coarse and quadrant of each token, (l). tables: (4, l), row q lists the tokens in sequence
    when quadrant q is selected; None where the order is no permutation.
    Differentiable in x, proj, decision and the parameters. Returns y in the dtype of x. Without
    tables, in float64, and on a CPU without kernels the sequence is written, as in
    `quadtree_scan_ref`. Raises as `route_scan` does.
    """
    check_gather(x, decision, *maps)
    if tables is not None and tuple(tables.shape) != (4, x.shape[1]):
        raise ValueError(
            f"quadtree_scan: expected tables (4, l) = (4, {x.shape[1]}), got {tuple(tables.shape)}"
        )
    kernels = selective_scan.route_ops.KERNELS
    if tables is None or not selective_scan.library.use_kernel("route_scan", x, kernels):
        return quadtree_scan_ref(x, proj, decision, parameters, maps)
    selective_scan.checks.check_route_scan(x, proj, *parameters, tables, tables[:1, :1], _REVERSE)
    wide = x
    if x.dtype != proj.dtype and torch.is_autocast_enabled(x.device.type):
        wide = x.to(torch.promote_types(x.dtype, proj.dtype))
        proj = proj.to(wide.dtype)
    return _quadtree_scan(wide, proj, decision, *parameters, tables, *maps)[0].to(x.dtype)


def _scan(
    x: Tensor,
    proj: Tensor,
    decision: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    tables: Tensor,
    fine: Tensor,
    coarse: Tensor,
    quadrant: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the states that the backward pass starts from, and the selected row of `tables`."""
    select = decision.argmax(1, keepdim=True).to(torch.int32)  # (b, 1)
    y, states = selective_scan.route_ops.route_scan_fwd(
        x, proj, dt_weight, dt_bias, A, D, tables, select, _REVERSE_BITS, False
    )
    return y, states, select


def _setup_context(ctx, inputs, output) -> None:
    x, proj, decision, *parameters, tables, fine, coarse, quadrant = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.decides = ctx.needs_input_grad[2]
    ctx.save_for_backward(x, proj, *parameters, tables, fine, coarse, quadrant, *output)


def _backward(ctx, dy, dstates, dselect) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    x, proj, *parameters, tables, fine, coarse, quadrant, y, states, select = ctx.saved_tensors
    dx, dproj, *grads = selective_scan.route_ops.route_scan_bwd(
        dy, x, proj, *parameters, tables, select, states, _REVERSE_BITS
    )
    ddecision = None
    if ctx.decides:
        pairs = [(x, dx), (proj.flatten(2), dproj.flatten(2)), (dy, y)]
        ddecision = decision_grad(pairs, select[:, 0], tables, fine, coarse, quadrant)
    return dx, dproj, ddecision, *grads, None, None, None, None


_op = torch.library.custom_op("quadmamba::quadtree_scan", _scan, mutates_args=())
_op.register_fake(_scan)
_op.register_autograd(_backward, setup_context=_setup_context)
_quadtree_scan = EagerOp(_op, {"cpu": _scan, "cuda": _scan})
_quadtree_scan.differentiate(_backward, _setup_context)
