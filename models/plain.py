"""Whether modules are what their classes say, so that their kernels may run as one node.

See `quadmamba.kernels.nodes`. A part that was replaced, hooked, overridden or parametrized has to
run by itself, and so do all parts where somebody watches what they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from quadmamba.kernels.dispatch import unwatched
from quadmamba.kernels.fused.launch import compute_dtype

DEVICES = {"cuda"}  # whose host is what a step waits for
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = frozenset({"project", "scan", "quadtree_scan", "weights", "select", "decide", "shift"})
_CALLS = _METHODS | {"forward", "_compiled_call_impl"}


def takes_node(x: Tensor) -> bool:
    """Whether the grid x (b, h, w, c) is one that goes through a node, where the modules allow."""
    if torch.compiler.is_compiling() or x.device.type not in DEVICES:
        return False
    return x.dim() == 4 and x.numel() > 0 and x.dtype in DTYPES and compute_dtype(x) in DTYPES


def plain_parts(module: nn.Module) -> tuple[type, ...] | None:
    """Types of the parts of `module`, depth first; None where more than their own code would run.

    Hooks of `module` itself do not count: they run before and after its `forward`.
    """
    found: list[type] = []
    if _has_any_global_hook() or not _METHODS.isdisjoint(module.__dict__):
        return None
    return tuple(found) if _walk(module, found) else None


def _walk(module: nn.Module, found: list[type]) -> bool:
    for part in module._modules.values():
        if part is None:
            continue
        own = part.__dict__
        for hooks in _HOOKS:
            if own[hooks]:
                return False
        found.append(type(part))
        if not _CALLS.isdisjoint(own) or not _walk(part, found):
            return False
    return True


def own(module: nn.Module, *names: str) -> list[Tensor | None]:
    """Parameters of `module` by name, None for one that it does not hold.

    As attributes each would cost half a microsecond, in a model that has hundreds.
    """
    params = module._parameters
    return [params.get(name) for name in names]


def fits(x: Tensor, others: Sequence[Tensor | None], params: Sequence[Tensor | None]) -> bool:
    """Whether nobody watches the tensors, and the params are of one dtype and on the device of x.

    Where gradients are wanted, all params have to be trained: a node finds the gradients of all.
    """
    first, device = params[0], x.device
    if first is None or not unwatched([x, *others, *params]):
        return False
    dtype, trained = first.dtype, 0
    for param in params:
        if param is None or param.dtype != dtype or param.device != device:
            return False
        trained += param.requires_grad
    if trained == len(params) or not torch.is_grad_enabled():
        return True
    return not trained and not any(t is not None and t.requires_grad for t in (x, *others))
