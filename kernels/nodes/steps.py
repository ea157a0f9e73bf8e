"""The kernels of a device type, below their ops: no autograd, no autocast, no checks of shapes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from quadmamba.kernels import selective_scan
from quadmamba.kernels.dispatch import EagerOp, Kernel
from quadmamba.kernels.fused.dwconv_silu import ops as dwconv_silu
from quadmamba.kernels.fused.layer_norm import ops as layer_norm
from quadmamba.kernels.fused.mlp import ops as mlp
from quadmamba.kernels.fused.predictor import ops as predictor
from quadmamba.kernels.fused.quadrant_choice import ops as quadrant_choice
from quadmamba.kernels.quadtree_gather import ops as quadtree_gather


class Steps(NamedTuple):
    """What a mixer or a block consists of, beside products; named as the ops are.

    add_score_backward: that of score, where the gradient of x is added to the first argument.
    """

    norm: Kernel
    norm_backward: Kernel
    add_norm: Kernel
    add_norm_backward: Kernel
    convolve: Kernel
    convolve_backward: Kernel
    score: Kernel
    add_score_backward: Kernel
    choose: Kernel
    choose_backward: Kernel
    decision_grad: Kernel
    scan: Kernel
    scan_backward: Kernel
    mlp: Kernel
    mlp_backward: Kernel


@cache
def steps_of(device: str) -> Steps:
    """The kernels for tensors of a device type; KeyError where one is missing."""

    def kernel(op: EagerOp) -> Kernel:
        return op.kernels[device]

    return Steps(
        norm=kernel(layer_norm._layer_norm),
        norm_backward=kernel(layer_norm._layer_norm_backward),
        add_norm=kernel(layer_norm._add_layer_norm),
        add_norm_backward=kernel(layer_norm._add_layer_norm_backward),
        convolve=kernel(dwconv_silu._dwconv_silu),
        convolve_backward=kernel(dwconv_silu._dwconv_silu_backward),
        score=kernel(predictor._predictor_score),
        add_score_backward=predictor.ADD_BACKWARD[device],
        choose=kernel(quadrant_choice._choice),
        choose_backward=kernel(quadrant_choice._choice_backward),
        decision_grad=kernel(quadtree_gather._decision_grad),
        scan=kernel(selective_scan.route_ops.route_scan_fwd),
        scan_backward=kernel(selective_scan.route_ops.route_scan_bwd),
        mlp=kernel(mlp._mlp),
        mlp_backward=kernel(mlp._mlp_backward),
    )
