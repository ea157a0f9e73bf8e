"""The token mixer in straight-line code: in_proj, convolution, choice, scan, norm, out_proj."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quadmamba.kernels.fused.casts import cast_all
from quadmamba.kernels.fused.launch import weight_grad
from quadmamba.kernels.nodes.node import Saved, Values
from quadmamba.kernels.nodes.steps import Steps, steps_of

PARAMETERS = 10  # of a mixer without a predictor
Grads = list[Tensor | None]


class Quadrants(NamedTuple):
    """Maps of a quadtree scan as in `QuadMaps`, and the temperature of the choice.

    eps: of the predictor's norm. learns: whether the choice has a gradient.
    """

    fine: Tensor
    coarse: Tensor
    quadrant: Tensor
    pool: Tensor
    count: Tensor
    tau: float
    eps: float
    learns: bool


class _Kept(NamedTuple):
    """What the gradient wants, in the order in which it comes about; then that of the choice."""

    w_in: Tensor
    w_x: Tensor
    w_out: Tensor
    filters: Tensor
    gain: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    D: Tensor
    x: Tensor
    projected: Tensor
    tokens: Tensor
    A: Tensor
    proj: Tensor
    select: Tensor
    states: Tensor
    y: Tensor
    normed: Tensor


class Mixer(NamedTuple):
    """A mixer on one grid. (b, h, w, c) -> the same, in the dtype of x.

    tables (t, l), select (1, k / 2): see `route_scan`; reverse: its flags as `reverse_bits`.
    quadrants: None, or of a quadtree scan, which selects the chosen quadrant. eps: of the norm.

    inputs: x (b, h, w, c); with a predictor the noise (b, 4) of its choice or None, else for a
    quadtree scan the one-hot decision (b, 4); then the parameters, of one dtype: in_proj (d, c),
    filters (d, 1, 3, 3), x_proj (k, r + 2n, d), dt_weight (k, d, r), dt_bias (k, d), A_log (k, d,
    n), D (k, d), gain (d) and shift (d) of the norm, out_proj (c, d), the predictor's ten.
    Kept for the gradient is what the single ops keep.
    """

    tables: Tensor
    select: Tensor | None
    reverse: int
    quadrants: Quadrants | None
    eps: float

    @staticmethod
    def takes(shape: Sequence[int], params: Sequence[Tensor]) -> bool:
        """Whether the shapes of the parameters fit each other and x of this shape."""
        return _fit(shape[-1], tuple(param.shape for param in params))

    def forward(self, inputs: Values, saved: Saved) -> Tensor:
        x, chosen, in_proj, filters, x_proj, dt_weight, dt_bias, A_log, D, *rest = inputs
        gain, shift, out_proj, *predictor = rest
        steps, (b, h, w, _), dtype = steps_of(x.device.type), x.shape, x.dtype
        w_in, w_x, w_out = cast_all((in_proj, x_proj, out_proj), dtype)
        saved += [w_in, w_x, w_out, filters, gain, dt_weight, dt_bias, D, x]
        keep = len(saved) > 0
        x = F.linear(x, w_in)  # (b, h, w, d)
        saved.append(x)
        x = steps.convolve(x, filters)
        select, choice = self._choose(steps, x, chosen, predictor, keep)
        A, x = torch.exp(A_log).neg_(), x.flatten(1, 2)  # (b, l, d)
        saved += [x, A]
        proj = F.linear(x, w_x.flatten(0, 1)).view(b, h * w, *w_x.shape[:2])
        index = self.tables, select, self.reverse
        y, states = steps.scan(x, proj, dt_weight, dt_bias, A, D, *index, False)
        saved += [proj, select, states, y]
        del x, proj, states
        y = steps.norm(y, gain, shift, self.eps, dtype)
        saved.append(y)
        saved += choice
        return F.linear(y.view(b, h, w, -1), w_out)

    def _choose(
        self, steps: Steps, x: Tensor, chosen: Tensor | None, predictor: list[Tensor], keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The selected rows of the tables, and what the gradient of the choice wants."""
        if self.quadrants is None:
            return self.select, []
        if not predictor:
            return chosen.argmax(1, keepdim=True).to(torch.int32), []
        *_, pool, count, tau, eps, learns = self.quadrants
        keep = keep and learns
        score, kept = steps.score(x, predictor, eps, keep)
        _, soft, select = steps.choose(score, pool, count, chosen, tau)
        return select, [soft, *predictor, *kept] if keep else []

    def backward(self, saved: Values, grads: Values, needs: Sequence[bool]) -> Grads:
        count = len(_Kept._fields)
        kept, choice, steps = _Kept(*saved[:count]), saved[count:], steps_of(grads[0].device.type)
        grad, dtype = grads[0].reshape(-1, kept.w_out.shape[0]), kept.dt_weight.dtype
        dout_proj = weight_grad(grad, kept.normed, dtype)
        dy = torch.mm(grad, kept.w_out).view(kept.y.shape)
        dy, dnorm = steps.norm_backward(dy, kept.y, kept.gain, self.eps)
        dtokens, dx_proj, dscan, dpredictor = self._scan_backward(steps, kept, choice, dy)
        del dy
        grid = kept.projected
        dgrid, dfilters = steps.convolve_backward(dtokens.view(grid.shape), grid, kept.filters)
        del dtokens
        din_proj = weight_grad(dgrid, kept.x, dtype)
        dx = torch.matmul(dgrid, kept.w_in) if needs[0] else None
        dparameters = [din_proj, dfilters, dx_proj, *dscan, *dnorm, dout_proj]
        return [dx, None, *dparameters, *(dpredictor or [None] * (len(needs) - PARAMETERS - 2))]

    def _scan_backward(
        self, steps: Steps, kept: _Kept, choice: Values, dy: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Gradients of the tokens, of x_proj, of dt_weight, dt_bias, A_log, D, of the predictor."""
        tokens, proj, A, dtype = kept.tokens, kept.proj, kept.A, kept.dt_weight.dtype
        inputs = tokens, proj, kept.dt_weight, kept.dt_bias, A, kept.D
        index = self.tables, kept.select, kept.states, self.reverse
        dtokens, dproj, ddt_weight, ddt_bias, dA, dD = steps.scan_backward(dy, *inputs, *index)
        dscore, dpredictor = None, []
        if choice:
            pairs = [tokens, proj.flatten(2), dy], [dtokens, dproj.flatten(2), kept.y]
            dscore = self._choice_backward(steps, kept, choice, pairs)
        rows = dproj.flatten(0, 1).flatten(1)  # (b l, k (r + 2n))
        dx_proj = weight_grad(rows, tokens, dtype).view(kept.w_x.shape)
        dtokens.flatten(0, 1).addmm_(rows, kept.w_x.flatten(0, 1))  # the sum of both gradients
        if dscore is not None:
            predictor, layers = choice[1:11], choice[11:]
            scored = dtokens, dscore, tokens, layers, predictor
            dpredictor = steps.add_score_backward(*scored, self.quadrants.eps)
        dscan = ddt_weight, ddt_bias, dA.mul_(A), dD
        dscan = [grad if grad.dtype == dtype else grad.to(dtype) for grad in dscan]
        return dtokens, dx_proj, dscan, dpredictor

    def _choice_backward(
        self, steps: Steps, kept: _Kept, choice: Values, pairs: tuple[list[Tensor], list[Tensor]]
    ) -> Tensor:
        """Gradient of the scores; pairs: see `decision_grad`."""
        fine, coarse, quadrant, pool, count, tau, *_ = self.quadrants
        maps = self.tables, fine, coarse, quadrant
        ddecision = steps.decision_grad(*pairs, kept.select.view(-1), *maps)
        return steps.choose_backward(ddecision, choice[0], pool, count, tau)


@lru_cache
def _fit(c: int, shapes: tuple[Sequence[int], ...]) -> bool:
    """Whether the parameters of a mixer of tokens of width c have shapes that belong together."""
    dt_weight, A_log = shapes[3], shapes[5]
    if len(dt_weight) != 3 or len(A_log) != 3:
        return False
    (k, d, r), n = dt_weight, A_log[2]
    scan = (k, r + 2 * n, d), (k, d, r), (k, d), (k, d, n), (k, d)
    expected = (d, c), (d, 1, 3, 3), *scan, (d,), (d,), (c, d)
    if len(shapes) > PARAMETERS:
        d2, d4 = d // 2, d // 4
        layers = ((d, d), (d,), (d2, d), (d2,), (d4, d2), (d4,), (2, d4), (2,))
        expected = *expected, (d,), (d,), *layers
    return shapes == expected
