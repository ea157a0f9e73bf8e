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
    with torch.no_grad():
        made = [torch.empty_like(param, dtype=dtype) for param in params]
        if made:
            torch._foreach_copy_(made, params)
    _copies.of = {id(param): copy for param, copy in zip(params, made)}
    try:
        yield
    finally:
        _copies.of = before


def cast(param: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of param in `dtype`, without its gradient."""
    if param.dtype == dtype:
        return param.detach()
    if not torch.compiler.is_compiling() and _copies.of is not None:
        copy = _copies.of.get(id(param))
        if copy is not None and copy.dtype == dtype:
            return copy
    return param.detach().to(dtype)
