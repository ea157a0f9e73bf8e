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

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from einops import repeat
from torch import Tensor

T = TypeVar("T")
SHIFT_SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))  # the directions of successive shifted blocks
PARTITION_SIDES = (1, 2, 4, 8)  # windows on a side of the grid that a level may have
_CACHE = 256  # grids x devices whose maps are kept; those of a 56x56 grid take 0.2 MB


def _kept(make: Callable[..., T]) -> Callable[..., T]:
    """Keep results of `make`, made outside inference mode: its tensors would spoil later training.

    Nothing is kept of a call under a dispatch mode such as FakeTensorMode. In a compiled graph the
    result is a constant: it is looked up while tracing.
    """
    kept = lru_cache(_CACHE)(torch.inference_mode(False)(make))

    def boxed(*key: Hashable) -> tuple[T]:  # a tensor that is a constant by itself has no shape
        return ((make if torch._C._len_torch_dispatch_stack() else kept)(*key),)

    # What torch.compiler.assume_constant_result(boxed) does, which imports the whole compiler
    boxed._dynamo_marked_constant = True

    @wraps(make)
    def lookup(*key: Hashable) -> T:
        return boxed(*key)[0]

    return lookup


@dataclass(frozen=True)
class QuadMaps:
    """Maps of one grid for the quadtree orders, on one device; indices are int32.

    fine, coarse: (l) position of each token in the two-level and in the one-level order.
    quadrant: (l) quadrant 0..3 of each token, after the shift.
    pool: (l) quadrant 0..3 for which the score of a token counts; count: (4) float32, how many
    tokens count for each.
    tables: (4, l) where every selection is a permutation: row q lists the token at each position
    when q is selected.
    """

    fine: Tensor
    coarse: Tensor
    quadrant: Tensor
    pool: Tensor
    count: Tensor
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
    """The paper's order (Fig. 1c): four quadrants, the selected one cut in four. A permutation.

    partition: windows on a side outside and inside the selected quadrant (paper Table 5), each a
    power of 2. (2, 4) is the published one, (2, 2) has one level only.
    """

    partition: tuple[int, int] = (2, 4)
    nested = True

    def __post_init__(self) -> None:
        if any(side not in PARTITION_SIDES for side in self.partition):
            raise ValueError(
                f"partition: expected two of {PARTITION_SIDES} windows on a side, "
                f"got {self.partition}"
            )
        if self.nested and 1 in self.partition:
            raise ValueError(
                "partition: expected at least 2 windows on a side, as one window does not lie in a "
                f"quadrant (only the release order can scan it), got {self.partition}"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether the sequence is the same for every selection."""
        return self.partition[0] == self.partition[1]

    def shift(self, h: int, w: int, sign: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns by which a shifted block rolls an h x w grid."""
        return sign[0] * (h // 8), sign[1] * ((w if self.nested else h) // 8)

    def maps(self, h: int, w: int, shift: tuple[int, int], device: torch.device) -> QuadMaps:
        """Maps of an h x w grid rolled by `shift`; scores are rolled along with the tokens."""
        return _quad_maps(h, w, shift, self.partition, self.nested, device)


@dataclass(frozen=True)
class ReleaseOrder(QuadtreeOrder):
    """The official code's order: a level is a raster over all its windows, 4x4 in the fine one.

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


def build_order(name: str, window: int = 7, partition: Sequence[int] = (2, 4)) -> ScanOrder:
    """The order called `name`; raises ValueError that lists the names.

    window is for "window", partition for "quadtree" and "release".
    """
    if name not in ORDERS:
        raise ValueError(f"scan order: expected one of {', '.join(ORDERS)}, got {name!r}")
    if name == "window" and window < 1:
        raise ValueError(f"window: expected a side of at least 1 token, got {window}")
    if name == "window":
        return WindowOrder(window)
    order = ORDERS[name]
    return order(tuple(partition)) if issubclass(order, QuadtreeOrder) else order()


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
    h: int,
    w: int,
    shift: tuple[int, int],
    partition: tuple[int, int],
    nested: bool,
    device: torch.device,
) -> QuadMaps:
    y, x = _grid(h, w)
    unrolled = 2 * _split(y, h)[0] + _split(x, w)[0]
    y, x = (y + shift[0]) % h, (x + shift[1]) % w  # where the roll puts each token
    quadrant = 2 * _split(y, h)[0] + _split(x, w)[0]
    coarse, fine = (_window_positions(y, x, h, w, windows, nested) for windows in partition)
    tables = None
    if nested or partition[0] == partition[1]:
        tables = torch.stack([_inverse(torch.where(quadrant == q, fine, coarse)) for q in range(4)])
        tables = tables.to(device, torch.int32)
    pool = quadrant if nested else unrolled
    count = (pool == torch.arange(4)[:, None]).sum(1).to(device, torch.float32)
    index = (m.to(device, torch.int32) for m in (fine, coarse, quadrant, pool))
    return QuadMaps(*index, count, tables)


def _window_positions(y: Tensor, x: Tensor, h: int, w: int, windows: int, nested: bool) -> Tensor:
    """Position of each token in the order of windows x windows: halves of halves of each side.

    nested: windows of one quadrant follow one another, at every level; else by rows of windows.
    """
    levels = windows.bit_length() - 1
    rows, columns = _halvings(y, h, levels), _halvings(x, w, levels)
    halves = [half for pair in zip(rows, columns) for half in pair] if nested else rows + columns
    return _inverse(_sort_by(*((half, 2) for half in halves), (y, h), (x, w)))


def window_index(i: Tensor, side: int, windows: int) -> Tensor:
    """The number, 0 to windows - 1, of the window of each index on a side."""
    number = torch.zeros_like(i)
    for half in _halvings(i, side, windows.bit_length() - 1):
        number = 2 * number + half
    return number


def _halvings(i: Tensor, side: int | Tensor, levels: int) -> list[Tensor]:
    """In which half (0, 1) of `side` each index lies, in which half of that half, and so on."""
    halves = []
    for _ in range(levels):
        half, i, side = _split(i, side)
        halves.append(half)
    return halves


def _grid(h: int, w: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token."""
    y, x = torch.arange(h), torch.arange(w)
    return repeat(y, "y -> (y x)", x=w), repeat(x, "x -> (y x)", y=h)


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
