"""Argument checks shared by references, fake kernels and ops: one place, one wording."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _expect(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], letters: str, op: str
) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(
            f"{op}: expected {name} of shape {letters} = {shape}, got {tuple(tensor.shape)}"
        )


def check_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ValueError unless the shapes fit `selective_scan` with B and C as (b, g, n, l)."""
    op = "selective_scan"
    if u.dim() != 3 or delta.dim() != 3 or A.dim() != 2 or B.dim() != 4:
        names = {"u": u, "delta": delta, "A": A, "B": B}
        got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in names.items())
        raise ValueError(
            f"{op}: expected u (b, d, l), delta (b, d, l) or (b, d / r, l), A (d, n) and "
            f"B (b, n, l) or (b, g, n, l), got {got}"
        )
    b, d, l = u.shape
    n, g, rows = A.shape[1], B.shape[1], delta.shape[1]
    if g < 1 or d % g:
        raise ValueError(
            f"{op}: expected d to be a multiple of the groups of B, got d = {d} and {g} groups"
        )
    if rows != d and (rows < 1 or d % rows):
        raise ValueError(
            f"{op}: expected d to be a multiple of the channels of delta, got d = {d} and "
            f"{rows} channels of delta"
        )
    letters = "d" if rows == d else "d / r"
    _expect("delta", delta, (b, rows, l), f"(b, {letters}, l)", op)
    _expect("A", A, (d, n), "(d, n)", op)
    _expect("B", B, (b, g, n, l), "(b, g, n, l)", op)
    _expect("C", C, (b, g, n, l), "(b, g, n, l)", op)
    _expect("D", D, (d,), "(d)", op)
    _expect("z", z, (b, d, l), "(b, d, l)", op)
    _expect("delta_bias", delta_bias, (rows,), f"({letters})", op)


def check_scan_dtypes(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> None:
    """Raise ValueError unless u, delta, B and C share a dtype the kernels take."""
    dtypes = [x.dtype for x in (u, delta, B, C)]
    if len(set(dtypes)) > 1 or u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            "selective_scan: expected u, delta, B and C all float32, all float16 or all bfloat16, "
            f"got {', '.join(str(dtype) for dtype in dtypes)}"
        )


def check_route_scan(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    tables: Tensor,
    select: Tensor,
    reverse: Sequence[bool],
) -> None:
    """Raise ValueError unless the shapes fit `route_scan`."""
    op = "route_scan"
    if (
        x.dim() != 3
        or dt_weight.dim() != 3
        or A.dim() != 3
        or tables.dim() != 2
        or select.dim() != 2
    ):
        names = {"x": x, "dt_weight": dt_weight, "A": A, "tables": tables, "select": select}
        got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in names.items())
        raise ValueError(
            f"{op}: expected x (b, l, d), dt_weight (k, d, r), A (k, d, n), tables (t, l), "
            f"select (b, k), got {got}"
        )
    b, l, d = x.shape
    k, _, r = dt_weight.shape
    n = A.shape[2]
    _expect("proj", proj, (b, l, k, r + 2 * n), "(b, l, k, r + 2n)", op)
    _expect("dt_weight", dt_weight, (k, d, r), "(k, d, r)", op)
    _expect("dt_bias", dt_bias, (k, d), "(k, d)", op)
    _expect("A", A, (k, d, n), "(k, d, n)", op)
    _expect("D", D, (k, d), "(k, d)", op)
    if tables.shape[1] != l or tables.is_floating_point() or select.is_floating_point():
        raise ValueError(
            f"{op}: expected integer tables (t, {l}) and integer select, "
            f"got {tables.dtype} {tuple(tables.shape)} and {select.dtype}"
        )
    _check_routes(select, reverse, b, k)


def _check_routes(select: Tensor, reverse: Sequence[bool], b: int, k: int) -> None:
    """Raise ValueError unless select is (b | 1, k), or (b | 1, k / 2) for routes both ways."""
    rows, columns = select.shape
    both_ways = list(reverse) == [False] * (k // 2) + [True] * (k // 2) and 2 * columns == k
    if rows not in (1, b) or len(reverse) != k or not (columns == k or both_ways):
        raise ValueError(
            f"route_scan: expected select ({b}, {k}) or (1, {k}) and {k} reverse flags, or "
            f"{k} / 2 columns and the flags of k / 2 routes forwards, then k / 2 backwards, "
            f"got {(rows, columns)} and flags {list(reverse)}"
        )
