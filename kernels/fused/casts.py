"""Copies of parameters in the dtype of a computation, made for a whole model in one pass.

Autocast casts one weight at a time, at a launch each and, with its gradient on the way back, at two
autograd nodes each. The ops of this package want the copy only as a value: they return gradients
for the parameter itself, in its own dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from quadmamba.kernels.fused.launch import compute_dtype


class _Copies(threading.local):
    of: dict[int, Tensor] | None = None  # by id of the parameter


_copies = _Copies()


@contextmanager
def cast_together(params: Sequence[Tensor], x: Tensor) -> Iterator[None]:
    """Within this context the ops find copies of `params` in the dtype that they compute x in.

    The copies are made at its begin; the parameters, on the device of x, must not change within.
    """
    before, dtype = _copies.of, compute_dtype(x)
    params = [param for param in params if param.dtype != dtype]
    _copies.of = {id(param): copy for param, copy in zip(params, _made(params, dtype))}
    try:
        yield
    finally:
        _copies.of = before


def cast(param: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of param in `dtype`, without its gradient."""
    known = _known(param, dtype)
    return param.detach().to(dtype) if known is None else known


def cast_all(params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`cast` of each, where copies are missing all of them in one pass."""
    found = [_known(param, dtype) for param in params]
    missing = [param for param, copy in zip(params, found) if copy is None]
    made = iter(_made(missing, dtype))
    return [next(made) if copy is None else copy for copy in found]


def _known(param: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The values of param in `dtype` where they need not be computed."""
    if param.dtype == dtype:
        return param.detach()
    if not torch.compiler.is_compiling() and _copies.of is not None:
        copy = _copies.of.get(id(param))
        if copy is not None and copy.dtype == dtype:
            return copy
    return None


def _made(params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    with torch.no_grad():
        made = [torch.empty_like(param, dtype=dtype) for param in params]
        if made:
            torch._foreach_copy_(made, params)
    return made
