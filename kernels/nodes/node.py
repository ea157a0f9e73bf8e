"""A computation and its gradient in straight-line code as one node of the autograd graph."""

from __future__ import annotations

from collections import deque
from collections.abc import MutableSequence, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from quadmamba.kernels.dispatch import AUTOCAST
from quadmamba.kernels.fused.launch import device_of

Values = Sequence[Tensor | None]
Saved = MutableSequence[Tensor | None]


class Plain(Protocol):
    """A computation whose tensors are `inputs`; all else that it depends on is its own."""

    def forward(self, inputs: Values, saved: Saved) -> Tensor | tuple[Tensor, ...]:
        """The outputs; what the gradient wants is appended to `saved`."""

    def backward(self, saved: Values, grads: Values, needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of the inputs from those of the outputs; needs: which are wanted."""


def run(plain: Plain, inputs: Values) -> Any:
    """The outputs of `plain`, differentiable once in the inputs; the first one says the device."""
    if torch.is_grad_enabled():
        for value in inputs:
            if value is not None and value.requires_grad:
                return _Node.apply(plain, *inputs)
    return _forward(plain, inputs, deque(maxlen=0))  # which holds nothing


def _below(x: Tensor) -> tuple[AbstractContextManager, ...]:
    """Contexts in which kernels run: the device of x, below autograd and autocast."""
    below = torch._C._AutoDispatchBelowAutograd()
    return device_of(x), below, torch._C._ExcludeDispatchKeyGuard(AUTOCAST)


def _forward(plain: Plain, inputs: Values, saved: Saved) -> Any:
    device, below, excluded = _below(inputs[0])
    with device, below, excluded:
        return plain.forward(inputs, saved)


class _Node(Function):
    """`plain.forward` and `plain.backward`."""

    @staticmethod
    def forward(ctx: Any, plain: Plain, *inputs: Tensor | None) -> Any:
        saved: list[Tensor | None] = []
        output = _forward(plain, inputs, saved)
        ctx.plain = plain
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device, below, excluded = _below(grads[0])
        with device, below, excluded:
            found = ctx.plain.backward(ctx.saved_tensors, grads, ctx.needs_input_grad[1:])
        return None, *found
