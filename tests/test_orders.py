"""Scan orders beside tables by hand and sorting in plain Python; what they take is restored."""

import pytest
import torch

from quadmamba.kernels import selective_scan
from quadmamba.kernels.quadtree_gather import gather_in_ref, gather_out_ref
from quadmamba.models.orders import (
    ORDERS,
    SHIFT_SIGNS,
    QuadtreeOrder,
    ReleaseOrder,
    build_order,
    cross_routes,
)
from quadmamba.models.ss2d import SS2D, QuadSS2D

CPU = torch.device("cpu")
SIZES = [(1, 1), (2, 2), (5, 7), (7, 5), (13, 13), (14, 14), (28, 28), (20, 36), (33, 17)]
SIGNS = [None, *SHIFT_SIGNS]


def half(i, side):
    """(half, place in it, its length) of index i, in plain Python."""
    first = -(-side // 2)
    return (0, i, first) if i < first else (1, i - first, side - first)


def literal_positions(h, w, shift, nested):
    """P_coarse, P_fine, quadrant of every token by sorting tuples, straight from the definition."""
    coarse, fine, quadrant = {}, {}, {}
    for y in range(h):
        for x in range(w):
            v, u = (y + shift[0]) % h, (x + shift[1]) % w
            (qy, iy, ny), (qx, ix, nx) = half(v, h), half(u, w)
            (sy, jy, _), (sx, jx, _) = half(iy, ny), half(ix, nx)
            t = y * w + x
            coarse[t] = (qy, qx, iy, ix)
            fine[t] = (qy, qx, sy, sx, jy, jx) if nested else (qy, sy, qx, sx, jy, jx)
            quadrant[t] = 2 * qy + qx

    def rank(keys):
        return {t: p for p, t in enumerate(sorted(keys, key=keys.get))}

    return rank(coarse), rank(fine), quadrant


def shift_of(order, h, w, sign):
    return order.shift(h, w, sign) if sign else (0, 0)


def one_hot_grid(h, w):
    """A batch of 4 images, image q with quadrant q selected."""
    return torch.randn(4, h * w, 3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("side", [1, 3, 4, 7, None])
def test_tables_are_windows_by_rows_and_by_columns(side, h, w):
    """side: None for the raster order, one window of any size."""
    tables = build_order("window" if side else "raster", side or 7).tables(h, w, CPU)
    side = side or 99
    tokens = [(y, x) for y in range(h) for x in range(w)]
    rows = sorted(tokens, key=lambda t: (t[0] // side, t[1] // side, t[0], t[1]))
    columns = sorted(tokens, key=lambda t: (t[1] // side, t[0] // side, t[1], t[0]))
    assert tables.tolist() == [[y * w + x for y, x in order] for order in (rows, columns)]
    assert tables.dtype == torch.int32


def test_tables_by_hand():
    raster = build_order("raster").tables(2, 3, CPU)
    assert raster.tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]]
    rows, columns = build_order("window", 2).tables(3, 4, CPU).tolist()
    assert rows == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    assert columns == [0, 4, 1, 5, 8, 9, 2, 6, 3, 7, 10, 11]
    assert build_order("window").window == 7
    assert cross_routes(CPU).tolist() == [[0, 1]]
    assert cross_routes(CPU).dtype == torch.int32
    assert SS2D.reverse == [False, False, True, True], "rows, columns, and both backwards"
    assert (SS2D.routes, QuadSS2D.routes, QuadSS2D.reverse) == (4, 2, [False, True])


@pytest.mark.parametrize("name", ["quadtree", "release"])
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(("h", "w"), [(1, 5), (5, 7), (14, 14), (20, 36)])
def test_what_scores_count_for(name, sign, h, w):
    """Quadrants after the roll, for `release` before it; and how many tokens each has."""
    order = build_order(name)
    shift = shift_of(order, h, w, sign)
    maps = order.maps(h, w, shift, CPU)
    rolled, still = (literal_positions(h, w, s, True)[2] for s in (shift, (0, 0)))
    wanted = rolled if name == "quadtree" else still
    assert maps.quadrant.tolist() == [rolled[t] for t in range(h * w)]
    assert maps.pool.tolist() == [wanted[t] for t in range(h * w)]
    assert maps.count.tolist() == [list(wanted.values()).count(q) for q in range(4)]
    assert maps.count.dtype == torch.float32
    assert {m.dtype for m in (maps.fine, maps.coarse, maps.quadrant, maps.pool)} == {torch.int32}


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_quadtree_is_a_permutation_and_restores_exactly(h, w, sign):
    order = QuadtreeOrder()
    maps = order.maps(h, w, shift_of(order, h, w, sign), CPU)
    x, decision = one_hot_grid(h, w)
    index = (decision, maps.fine, maps.coarse, maps.quadrant)
    seq = gather_in_ref(x, *index)
    assert torch.equal(gather_out_ref(seq, *index), x)
    for q, table in enumerate(maps.tables.long()):
        assert torch.equal(table.sort().values, torch.arange(h * w))
        assert torch.equal(seq[q], x[q, table])


@pytest.mark.parametrize("name", ["quadtree", "release"])
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_maps_and_gathers_follow_the_double_sum(name, h, w, sign):
    order = build_order(name, 0)
    shift = shift_of(order, h, w, sign)
    maps = order.maps(h, w, shift, CPU)
    coarse, fine, quadrant = literal_positions(h, w, shift, name == "quadtree")
    x, decision = one_hot_grid(h, w)
    index = (decision, maps.fine, maps.coarse, maps.quadrant)
    seq, y = torch.zeros_like(x), torch.randn_like(x)
    out = torch.empty_like(x)
    for q in range(4):
        for t in range(h * w):
            position = fine[t] if quadrant[t] == q else coarse[t]
            seq[q, position] += x[q, t]
            out[q, t] = y[q, position]
    torch.testing.assert_close(gather_in_ref(x, *index), seq, rtol=0, atol=1e-15)
    assert torch.equal(gather_out_ref(y, *index), out)


def test_release_collides_as_published_and_quadtree_does_not():
    for order, doubled in ((ReleaseOrder(), 0.125), (QuadtreeOrder(), 0.0)):
        maps = order.maps(56, 56, (0, 0), CPU)
        index = (torch.eye(4), maps.fine, maps.coarse, maps.quadrant)
        count = gather_in_ref(torch.ones(4, 56 * 56, 1), *index)
        for load in (0, 2):
            assert (count == load).double().mean().item() == doubled


def test_the_worked_example_of_the_documentation():
    maps = QuadtreeOrder().maps(4, 4, (0, 0), CPU)
    expected = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert maps.coarse.tolist() == expected
    maps = QuadtreeOrder().maps(8, 8, (0, 0), CPU)
    assert maps.tables[1, 16:20].tolist() == [4, 5, 12, 13]  # first sub-window of the top right
    assert maps.tables[0, 16:20].tolist() == [4, 5, 6, 7]  # the same quadrant, not selected


def test_shift_of_quadtree_and_release():
    assert SHIFT_SIGNS == ((1, 1), (-1, -1), (1, -1), (-1, 1))
    assert QuadtreeOrder().shift(56, 28, (1, -1)) == (7, -3)
    assert ReleaseOrder().shift(56, 28, (1, -1)) == (7, -7)
    assert QuadtreeOrder().shift(63, 7, (-1, 1)) == (-7, 0)


@pytest.mark.parametrize("sign", SHIFT_SIGNS)
def test_maps_equal_rolling_the_grid(sign):
    h, w = 20, 36
    order = QuadtreeOrder()
    shift = order.shift(h, w, sign)
    x = torch.randn(1, h, w, 2)
    rolled = torch.roll(x, shift, (1, 2)).flatten(1, 2)
    plain, moved = (order.maps(h, w, s, CPU) for s in ((0, 0), shift))
    decision = torch.eye(4)[2:3]
    seq = gather_in_ref(rolled, decision, plain.fine, plain.coarse, plain.quadrant)
    ours = gather_in_ref(x.flatten(1, 2), decision, moved.fine, moved.coarse, moved.quadrant)
    assert torch.equal(seq, ours)


def test_release_pools_scores_before_the_roll_and_quadtree_after():
    grid = (16, 16)
    release, quadtree = ReleaseOrder(), QuadtreeOrder()
    still = quadtree.maps(*grid, (0, 0), CPU)
    assert torch.equal(release.maps(*grid, (2, 2), CPU).pool, still.quadrant)
    moved = quadtree.maps(*grid, (2, 2), CPU)
    assert torch.equal(moved.pool, moved.quadrant)
    assert not torch.equal(moved.quadrant, still.quadrant)


@pytest.mark.parametrize("name", ["raster", "window"])
@pytest.mark.parametrize(("h", "w"), [(5, 7), (14, 14)])
def test_route_scan_restores_every_token(name, h, w):
    """With a state that never reaches the output (C = 0) and D = 1, k routes give k times x."""
    x = torch.randn(2, h * w, 6)
    proj = torch.randn(2, h * w, 4, 5)
    proj[..., -1] = 0
    k, d, r, n = 4, 6, 3, 1
    weights = torch.randn(k, d, r), torch.randn(k, d), -torch.rand(k, d, n), torch.ones(k, d)
    tables = build_order(name, 4).tables(h, w, CPU)
    y = selective_scan.route_scan_ref(
        x, proj, *weights, tables, torch.tensor([[0, 1, 0, 1]]), SS2D.reverse
    )
    assert torch.equal(y, 4 * x)


def test_registry_and_unknown_order():
    assert set(ORDERS) == {"raster", "window", "quadtree", "release"}
    assert (ORDERS["release"], ORDERS["quadtree"]) == (ReleaseOrder, QuadtreeOrder)
    assert build_order("quadtree").partition == build_order("release").partition == (2, 4)
    assert build_order("release", 7, [4, 8]).partition == (4, 8)
    assert build_order("window", 1).window == 1
    with pytest.raises(ValueError, match="window: expected a side of at least 1 token, got 0"):
        build_order("window", 0)
    with pytest.raises(ValueError, match="expected one of raster, window, quadtree, release"):
        build_order("hilbert", 7)


# ----------------------------------------------------------------------------------- partitions
PARTITIONS = {
    "quadtree": [(2, 2), (2, 4), (4, 8), (4, 2), (8, 8)],
    "release": [(1, 2), (2, 2), (4, 8), (1, 8)],
}


def window_position(y, x, h, w, windows, nested):
    """The key by which a token is sorted: its window, then its place, on sides that divide."""
    sy, sx = h // windows, w // windows
    wy, wx = y // sy, x // sx
    if not nested:
        return wy, wx, y % sy, x % sx
    key, half = (), windows
    while half > 1:  # quadrant, quadrant of the quadrant, ...
        half //= 2
        key += (wy // half % 2, wx // half % 2)
    return *key, y % sy, x % sx


@pytest.mark.parametrize(
    ("name", "partition"), [(n, p) for n, all_of in PARTITIONS.items() for p in all_of]
)
def test_partitions_scan_window_after_window(name, partition):
    order, (h, w), shift = build_order(name, 0, list(partition)), (16, 24), (2, -3)
    maps = order.maps(h, w, shift, CPU)
    tokens = [((y + shift[0]) % h, (x + shift[1]) % w) for y in range(h) for x in range(w)]
    for found, windows in zip((maps.coarse, maps.fine), partition):
        keys = [window_position(y, x, h, w, windows, order.nested) for y, x in tokens]
        rank = {key: position for position, key in enumerate(sorted(keys))}
        assert found.tolist() == [rank[key] for key in keys]
    assert order.is_fixed == (partition[0] == partition[1]) == torch.equal(maps.coarse, maps.fine)
    assert (maps.tables is not None) == (name == "quadtree" or order.is_fixed)
    if maps.tables is not None:
        for q, table in enumerate(maps.tables.long()):
            position = torch.where(maps.quadrant == q, maps.fine, maps.coarse).long()
            assert torch.equal(position[table], torch.arange(h * w))


@pytest.mark.parametrize(
    ("name", "partition", "message"),
    [
        ("quadtree", (1, 2), "one window does not lie in a quadrant"),
        ("release", (2, 3), r"expected two of \(1, 2, 4, 8\) windows on a side, got \(2, 3\)"),
    ],
)
def test_impossible_partitions_are_named(name, partition, message):
    with pytest.raises(ValueError, match=message):
        build_order(name, 0, partition)
