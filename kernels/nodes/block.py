"""A block in straight-line code: sum and norm, mixer, sum and norm, MLP."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quadmamba.kernels.fused.casts import cast_all
from quadmamba.kernels.nodes.mixer import Grads, Mixer
from quadmamba.kernels.nodes.node import Saved, Values
from quadmamba.kernels.nodes.steps import steps_of

OWN = 12  # inputs before those of the mixer


class _Kept(NamedTuple):
    """What the gradient wants beside what the mixer's does."""

    gain: Tensor
    scale: Tensor | None
    total: Tensor
    gain2: Tensor
    scale2: Tensor | None
    total2: Tensor
    normed: Tensor
    hidden: Tensor
    weight1: Tensor
    weight2: Tensor


class Block(NamedTuple):
    """A block: the residual stream (b, h, w, c) and the branch to be added to it, and new ones.

    dtype: of the branches. eps, eps2: of the norms before mixer and MLP.

    inputs: the stream; the branch (b, h, w, c), or None where there is none yet; factors (b) of
    this branch and of the mixer's, or None; gain and shift (c) of both norms; weight and bias of
    the MLP's layers; then the mixer's inputs but x. Parameters are of one dtype.
    """

    mixer: Mixer
    dtype: torch.dtype
    eps: float
    eps2: float

    @staticmethod
    def takes(shape: Sequence[int], params: Sequence[Tensor]) -> bool:
        """Whether the shapes of the parameters fit each other and x of this shape."""
        own, c, m = tuple(param.shape for param in params[:8]), shape[-1], params[5].shape[0]
        expected = (c,), (c,), (c,), (c,), (m, c), (m,), (c, m), (c,)
        return own == expected and Mixer.takes(shape, params[8:])

    def forward(self, inputs: Values, saved: Saved) -> tuple[Tensor, Tensor]:
        x, branch, scale, scale2, gain, shift, gain2, shift2, *layers = inputs[:OWN]
        steps = steps_of(x.device.type)
        if branch is None:
            normed = steps.norm(x, gain, shift, self.eps, self.dtype)
        else:
            x, normed = steps.add_norm(x, branch, gain, shift, scale, self.eps, self.dtype)
        saved += [gain, scale, x, gain2, scale2]
        inner: Saved = [] if saved else deque(maxlen=0)
        branch = self.mixer.forward((normed, *inputs[OWN:]), inner)
        x, normed = steps.add_norm(x, branch, gain2, shift2, scale2, self.eps2, self.dtype)
        del branch
        copies = cast_all(layers, self.dtype)
        branch, hidden = steps.mlp(normed, *layers, *copies)
        saved += [x, normed, hidden, *copies[::2], *inner]
        return x, branch

    def backward(self, saved: Values, grads: Values, needs: Sequence[bool]) -> Grads:
        count, (dx, dbranch) = len(_Kept._fields), grads
        kept, steps = _Kept(*saved[:count]), steps_of(dx.device.type)
        weights, param_dtype = (kept.weight1, kept.weight2), kept.gain.dtype
        dnormed, *dlayers = steps.mlp_backward(
            dbranch, kept.normed, kept.hidden, *weights, param_dtype
        )
        norm = kept.total2, kept.gain2, kept.scale2, self.eps2, self.dtype
        dx, dbranch, dnorm2 = steps.add_norm_backward(dx, dnormed, *norm)
        inner = True, *needs[OWN:]
        dnormed, *dmixer = self.mixer.backward(saved[count:], (dbranch,), inner)
        norm = kept.total, kept.gain, kept.scale, self.eps, self.dtype
        dx, dbranch, dnorm = steps.add_norm_backward(dx, dnormed, *norm)
        dbranch = dbranch if needs[1] else None
        return [dx, dbranch, None, None, *dnorm, *dnorm2, *dlayers, *dmixer]
