"""SS2D: the token mixer, a selective scan over routes through the grid (QuadMamba, section 4.2).

    in_proj c -> d, depthwise 3x3, SiLU, scan over k routes, LayerNorm, out_proj d -> c

Features stay token-major (b, h, w, d) throughout. The numbers [dt, B, C] of a route are a linear
function of the token alone, so they are taken once in token order, whatever the route; a route is
an index table and a direction.
"""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadmamba.kernels import selective_scan
from quadmamba.kernels.fused import linear
from quadmamba.kernels.fused.launch import compute_dtype
from quadmamba.kernels.nodes import Mixer, Quadrants, run
from quadmamba.kernels.quadtree_scan import quadtree_scan
from quadmamba.models.layers import DepthwiseSiLU, LayerNorm, Linear, is_fused, tag
from quadmamba.models.orders import (
    QuadMaps,
    QuadtreeOrder,
    RasterOrder,
    WindowOrder,
    cross_routes,
)
from quadmamba.models.plain import fits, own, plain_parts, takes_node
from quadmamba.models.quadtree import (
    PREDICTOR_PARTS,
    QuadPredictor,
    choose_quadrant,
    draw_noise,
    first_quadrant,
    random_quadrant,
)

SELECTIONS = ("predictor", "random", "first")
DT_MIN, DT_MAX = 1e-3, 0.1  # range of softplus(dt_bias) at initialisation


class ScanParameters(nn.Module):
    """Parameters of k scans of d channels with n states and a step size of rank r.

    | parameter | shape | initial value |
    |---|---|---|
    | x_proj_weight | (k, r + 2n, d), rows dt, B, C | uniform in ±1/sqrt(d) |
    | dt_weight | (k, d, r) | uniform in ±1/sqrt(r) |
    | dt_bias | (k, d) | softplus(dt_bias) log-uniform in [1e-3, 0.1] |
    | A_log | (k, d, n) | log(1..n) |
    | D | (k, d) | 1 |
    """

    def __init__(self, routes: int, dim: int, d_state: int, dt_rank: int) -> None:
        super().__init__()
        dt = torch.exp(torch.empty(routes, dim).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        A = torch.arange(1, d_state + 1, dtype=torch.float32)
        rows = dt_rank + 2 * d_state
        self.x_proj_weight = nn.Parameter(
            torch.empty(routes, rows, dim).uniform_(-(dim**-0.5), dim**-0.5)
        )
        self.dt_weight = nn.Parameter(
            torch.empty(routes, dim, dt_rank).uniform_(-(dt_rank**-0.5), dt_rank**-0.5)
        )
        self.dt_bias = tag(nn.Parameter(dt + torch.log(-torch.expm1(-dt))), "ssm")
        self.A_log = tag(nn.Parameter(A.log().repeat(routes, dim, 1)), "ssm")
        self.D = tag(nn.Parameter(torch.ones(routes, dim)), "no_decay")

    def project(self, x: Tensor) -> Tensor:
        """[dt, B, C] of every token and route: (b, l, d) -> (b, l, k, r + 2n)."""
        if is_fused(x):
            return linear(x, self.x_proj_weight)
        return F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(
            -1, self.x_proj_weight.shape[:2]
        )

    def scan(
        self, x: Tensor, proj: Tensor, tables: Tensor, select: Tensor, reverse: list[bool]
    ) -> Tensor:
        """Sum of the k scans, tokens (b, l, d) -> (b, l, d); see `selective_scan.route_scan`."""
        index = (tables, select, reverse)
        return selective_scan.route_scan(x, proj, *self.weights(), *index, out_dtype=x.dtype)

    def quadtree_scan(self, x: Tensor, proj: Tensor, decision: Tensor, maps: QuadMaps) -> Tensor:
        """Sum of both scans over the quadtree sequence, tokens (b, l, d) -> (b, l, d)."""
        index = (maps.fine, maps.coarse, maps.quadrant)
        return quadtree_scan(x, proj, decision, self.weights(), index, maps.tables)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt_weight, dt_bias, A and D, as the scans take them."""
        return self.dt_weight, self.dt_bias, -torch.exp(self.A_log), self.D

    def macs(self, tokens: int) -> int:
        """Multiply-adds of the scans of one image: d·r for a token's delta, and 9·d·n + d.

        The second term is the official code's count, which takes operations for multiply-adds.
        """
        k, d, r = self.dt_weight.shape
        return k * tokens * d * (r + 9 * self.A_log.shape[-1] + 1)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module."""
        k, d, r = self.dt_weight.shape
        return f"routes={k}, dim={d}, d_state={self.A_log.shape[-1]}, dt_rank={r}"


class SS2D(nn.Module):
    """Token mixer over rows, columns, and both backwards. (b, h, w, dim) -> the same."""

    routes = 4
    reverse = [False, False, True, True]

    def __init__(
        self,
        dim: int,
        *,
        order: RasterOrder | WindowOrder | QuadtreeOrder,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
    ) -> None:
        super().__init__()
        inner = int(dim * ssm_ratio)
        self.order = order
        self.in_proj = Linear(dim, inner)
        self.conv = DepthwiseSiLU(inner)
        self.ssm = ScanParameters(self.routes, inner, d_state, dt_rank=math.ceil(dim / 16))
        self.out_norm = LayerNorm(inner)
        self.out_proj = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        if takes_node(x) and plain_parts(self) in PARTS.get(type(self), ()):
            plan, weights = self.plan(x), self.weights()
            if plan is not None and fits(x, (), weights) and Mixer.takes(x.shape, weights):
                return run(plan, [x.to(compute_dtype(x)), self.chosen(x), *weights])
        x = self.conv(self.in_proj(x))  # (b, h, w, d)
        y = self.scan(x).view(x.shape)
        return self.out_proj(self.out_norm(y))

    def plan(self, x: Tensor) -> Mixer | None:
        """What is fixed of the mixer on the grid of x, for a node; None where it has none."""
        h, w = (operator.index(side) for side in x.shape[1:3])
        tables = self.order.tables(h, w, x.device)
        reverse = selective_scan.route_ops.reverse_bits(self.reverse)
        return Mixer(tables, cross_routes(x.device), reverse, None, self.out_norm.eps)

    def chosen(self, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """What a node is given beside x (b, h, w, dim) and the weights; see `Mixer`."""
        return None

    def weights(self) -> list[Tensor | None]:
        """All parameters, as a node takes them; see `Mixer`."""
        parts = self._modules
        scan = own(parts["ssm"], "x_proj_weight", "dt_weight", "dt_bias", "A_log", "D")
        ends = *own(parts["out_norm"], "weight", "bias"), *own(parts["out_proj"], "weight")
        return [*own(parts["in_proj"], "weight"), *own(parts["conv"], "weight"), *scan, *ends]

    def scan(self, x: Tensor) -> Tensor:
        """Scan core: grid (b, h, w, d) -> tokens (b, h·w, d)."""
        # a compiled graph is for one size: index() makes the sides constants of it
        tables = self.order.tables(operator.index(x.shape[1]), operator.index(x.shape[2]), x.device)
        select = cross_routes(x.device)
        x = x.flatten(1, 2)  # (b, l, d)
        return self.ssm.scan(x, self.ssm.project(x), tables, select, self.reverse)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module."""
        return f"order={self.order}"


class QuadSS2D(SS2D):
    """Token mixer over the learned quadtree sequence, forwards and backwards (paper Alg. 1-4).

    sign: None, or the signs (rows, columns) of this block's shift. selection: who chooses the
    quadrant: "predictor", "random" or "first" (always the top left one). tau, gumbel: temperature
    and noise of the choice in training. seed: of the random choice in eval.

    predictor: None where nothing is to be chosen: with another selection, or an order whose two
    levels are the same.
    """

    order: QuadtreeOrder

    routes = 2
    reverse = [False, True]

    def __init__(
        self,
        dim: int,
        *,
        order: QuadtreeOrder,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        sign: tuple[int, int] | None = None,
        tau: float = 1.0,
        gumbel: bool = True,
        selection: str = "predictor",
        seed: int = 0,
    ) -> None:
        super().__init__(dim, order=order, ssm_ratio=ssm_ratio, d_state=d_state)
        if tau <= 0:
            raise ValueError(f"QuadSS2D: expected a temperature tau above 0, got {tau}")
        if selection not in SELECTIONS:
            expected = ", ".join(SELECTIONS)
            raise ValueError(f"selection: expected one of {expected}, got {selection!r}")
        self.sign, self.tau, self.gumbel = sign, tau, gumbel
        self.selection, self.seed = "first" if order.is_fixed else selection, seed
        learned = self.selection == "predictor"
        self.predictor = QuadPredictor(int(dim * ssm_ratio)) if learned else None

    def shift(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns by which this block rolls an h x w grid."""
        return self.order.shift(h, w, self.sign) if self.sign else (0, 0)

    def decide(self, score: Tensor) -> Tensor:
        """The selected quadrant, one-hot (b, 4), from the scores (b, h, w) of the tokens."""
        h, w = (operator.index(side) for side in score.shape[1:])
        maps = self.order.maps(h, w, self.shift(h, w), score.device)
        return choose_quadrant(score, maps, self.tau, self.training, self.gumbel)

    def plan(self, x: Tensor) -> Mixer | None:
        h, w = (operator.index(side) for side in x.shape[1:3])
        maps = self.order.maps(h, w, self.shift(h, w), x.device)
        if maps.tables is None:
            return None
        learns, eps = False, 0.0
        if self.predictor is not None:
            learns, eps = self.training, self.predictor.layers()[0].eps
        index = maps.fine, maps.coarse, maps.quadrant, maps.pool, maps.count
        quadrants = Quadrants(*index, self.tau, eps, learns)
        reverse = selective_scan.route_ops.reverse_bits(self.reverse)
        return Mixer(maps.tables, None, reverse, quadrants, self.out_norm.eps)

    def chosen(self, x: Tensor) -> Tensor | None:
        if self.predictor is None:
            return self.select(x)
        return draw_noise(x, torch.float32) if self.training and self.gumbel else None

    def weights(self) -> list[Tensor | None]:
        layers = self.predictor.layers() if self.predictor is not None else ()
        learned = [param for layer in layers for param in own(layer, "weight", "bias")]
        return [*super().weights(), *learned]

    def select(self, x: Tensor) -> Tensor:
        """The selected quadrant of the grids x (b, h, w, d), one-hot (b, 4)."""
        if self.predictor is not None:
            return self.decide(self.predictor(x))
        if self.selection == "random":
            return random_quadrant(len(x), x.device, self.seed, self.training)
        return first_quadrant(len(x), x.device)

    def scan(self, x: Tensor) -> Tensor:
        """Scan core: grid (b, h, w, d) -> tokens (b, h·w, d)."""
        h, w = (operator.index(side) for side in x.shape[1:3])
        maps = self.order.maps(h, w, self.shift(h, w), x.device)
        decision = self.select(x)
        x = x.flatten(1, 2)  # (b, l, d)
        return self.ssm.quadtree_scan(x, self.ssm.project(x), decision, maps)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this module."""
        choice = f"selection={self.selection}, tau={self.tau}, gumbel={self.gumbel}"
        return f"{super().extra_repr()}, sign={self.sign}, {choice}"


_PARTS = (Linear, DepthwiseSiLU, ScanParameters, LayerNorm, Linear)
# Mixers that run as one node, and the types of their parts at all depths, in order
PARTS: dict[type, tuple[tuple[type, ...], ...]] = {
    SS2D: (_PARTS,),
    QuadSS2D: (_PARTS, _PARTS + (QuadPredictor, *PREDICTOR_PARTS)),
}
