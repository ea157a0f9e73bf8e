"""Scan orders: in which sequence the tokens of an h x w grid are scanned.

An order is a set of integer maps and nothing else: no token is copied, padded or moved. A *table*
lists the token (raster index y·w + x) at each position of the sequence; a route walks one table
forwards or backwards.

An 8x8 grid in the `quadtree` order, quadrant 1 (top right) selected. Each cell is a 2x2 block of
tokens and shows its first position:

     0  2 | 16 20
     8 10 | 24 28
    ------+------
    32 34 | 48 50
    40 42 | 56 58

Quadrants follow one another: top left, top right, bottom left, bottom right. A quadrant that is not
selected is scanned in raster order (its first row has positions 0 to 3), the selected one window by
window (its first window has positions 16 to 19).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SHIFT_SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))  # the directions of successive shifted blocks
_CACHE = 256  # grids x devices whose maps are kept; those of a 56x56 grid take 0.2 MB


def _kept(make: Callable[..., T]) -> Callable[..., T]:
    """Keep results of `make`, made outside inference mode: its tensors would spoil later training.

    Nothing is kept of a call under a dispatch mode such as FakeTensorMode, or while compiling.
    """
    kept = lru_cache(_CACHE)(torch.inference_mode(False)(make))

    @wraps(make)
    def lookup(*key: Hashable) -> T:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return make(*key)
        return kept(*key)

    return lookup


@dataclass(frozen=True)
class QuadMaps:
    """Maps of one grid for the quadtree orders, on one device; indices are int32.

    fine, coarse: (l) position of each token in the two-level and in the one-level order.
    quadrant: (l) quadrant 0..3 of each token, after the shift.
    member: (4, l) float32, 1 where the score of a token counts for a quadrant; count: (4) float32,
    its tokens, at least 1; empty: (4) bool, quadrants without tokens.
    tables: (4, l) where every selection is a permutation: row q lists the token at each position
    when q is selected.
    """

    fine: Tensor
    coarse: Tensor
    quadrant: Tensor
    member: Tensor
    count: Tensor
    empty: Tensor
    tables: Tensor | None


@dataclass(frozen=True)
class RasterOrder:
    """VMamba's cross scan: by rows, by columns, and both backwards."""

    def tables(self, h: int, w: int, device: torch.device) -> Tensor:
        """(2, l) int32: the tokens by rows and by columns."""
        return _window_tables(h, w, max(h, w, 1), device)


@dataclass(frozen=True)
class WindowOrder:
    """LocalMamba's fixed windows: window after window, by rows and by columns, and both backwards.

    window: side in tokens. Windows at the right and bottom edge are smaller where the side does not
    divide.
    """

    window: int = 7

    def tables(self, h: int, w: int, device: torch.device) -> Tensor:
        """(2, l) int32: windows and their tokens by rows, and by columns."""
        return _window_tables(h, w, self.window, device)


@dataclass(frozen=True)
class QuadtreeOrder:
    """The paper's order (Fig. 1c): four quadrants, the selected one cut in four. A permutation."""

    nested = True

    def shift(self, h: int, w: int, sign: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns by which a shifted block rolls an h x w grid."""
        return sign[0] * (h // 8), sign[1] * ((w if self.nested else h) // 8)

    def maps(self, h: int, w: int, shift: tuple[int, int], device: torch.device) -> QuadMaps:
        """Maps of an h x w grid rolled by `shift`; scores are rolled along with the tokens."""
        return _quad_maps(h, w, shift, self.nested, device)


@dataclass(frozen=True)
class ReleaseOrder(QuadtreeOrder):
    """The official code's order: the fine level is a raster over all 4x4 windows.

    Tokens collide: an eighth of the positions hold the sum of two tokens and an eighth are empty.
    Both axes roll by h // 8, and scores are pooled before the roll. The official weights were
    trained so; the order exists to run them.
    """

    nested = False


ScanOrder = RasterOrder | WindowOrder | QuadtreeOrder

ORDERS: dict[str, type[ScanOrder]] = {
    "raster": RasterOrder,
    "window": WindowOrder,
    "quadtree": QuadtreeOrder,
    "release": ReleaseOrder,
}


def build_order(name: str, window: int) -> ScanOrder:
    """The order called `name`; raises ValueError that lists the names. `window` is for "window"."""
    if name not in ORDERS:
        raise ValueError(f"scan order: expected one of {', '.join(ORDERS)}, got {name!r}")
    if name == "window" and window < 1:
        raise ValueError(f"window: expected a side of at least 1 token, got {window}")
    return WindowOrder(window) if name == "window" else ORDERS[name]()


@_kept
def cross_routes(device: torch.device) -> Tensor:
    """(1, 2) int32: the tables of a cross scan, rows and columns, each walked both ways."""
    return torch.tensor([[0, 1]], dtype=torch.int32, device=device)


@_kept
def _window_tables(h: int, w: int, side: int, device: torch.device) -> Tensor:
    y, x = _grid(h, w)
    wy, wx = y // side, x // side
    rows = _sort_by((wy, h), (wx, w), (y, h), (x, w))
    columns = _sort_by((wx, w), (wy, h), (x, w), (y, h))
    return torch.stack([rows, columns]).to(device, torch.int32)


@_kept
def _quad_maps(
    h: int, w: int, shift: tuple[int, int], nested: bool, device: torch.device
) -> QuadMaps:
    y, x = _grid(h, w)
    unrolled = 2 * _split(y, h)[0] + _split(x, w)[0]
    y, x = (y + shift[0]) % h, (x + shift[1]) % w  # where the roll puts each token
    qy, inner_y, side_y = _split(y, h)
    qx, inner_x, side_x = _split(x, w)
    sy, sx = _split(inner_y, side_y)[0], _split(inner_x, side_x)[0]
    quadrant = 2 * qy + qx
    levels = (
        [(qy, 2), (qx, 2), (sy, 2), (sx, 2)] if nested else [(qy, 2), (sy, 2), (qx, 2), (sx, 2)]
    )
    coarse = _inverse(_sort_by((qy, 2), (qx, 2), (y, h), (x, w)))
    fine = _inverse(_sort_by(*levels, (y, h), (x, w)))
    tables = None
    if nested:
        tables = torch.stack([_inverse(torch.where(quadrant == q, fine, coarse)) for q in range(4)])
        tables = tables.to(device, torch.int32)
    member = (quadrant if nested else unrolled) == torch.arange(4)[:, None]
    count = member.sum(1)
    index = (m.to(device, torch.int32) for m in (fine, coarse, quadrant))
    pooling = (m.to(device, torch.float32) for m in (member, count.clamp(min=1)))
    return QuadMaps(*index, *pooling, (count == 0).to(device), tables)


def _grid(h: int, w: int) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return y.reshape(-1), x.reshape(-1)


def _split(i: Tensor, side: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The half of `side` that holds each index, its place there and the half's length."""
    first = (side + 1) // 2
    half = (i >= first).long()
    return half, i - half * first, torch.where(half == 0, first, side - first)


def _sort_by(*keys: tuple[Tensor, int]) -> Tensor:
    """Tokens sorted by (key, size) pairs, the most significant first; keys lie in [0, size)."""
    rank = torch.zeros_like(keys[0][0])
    for key, size in keys:
        rank = rank * size + key
    return torch.argsort(rank)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation))
    return inverse
