"""The names of classes, in the order of a head's outputs: those of weights against the data's."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from quadmamba.utils.formats import CheckpointError, first


def names_in(payload: Mapping[str, object], path: object) -> tuple[str, ...]:
    """The class names that a file's content lists under "classes"; () where it has no such list.

    Raises CheckpointError where one comes twice.
    """
    names = payload.get("classes")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    if len(set(_alike(names))) < len(names):
        raise CheckpointError(f"{path}: expected each class once in its list of classes")
    return tuple(names)


def same(saved: Sequence[str], now: Sequence[str]) -> bool:
    """Whether both are the same names in the same order, however their accents are encoded."""
    return _alike(saved) == _alike(now)


def rows_of(saved: Sequence[str], now: Sequence[str]) -> list[int] | None:
    """Where each class of the data is among those of the weights; None where one is not."""
    place = {name: i for i, name in enumerate(_alike(saved))}
    rows = [place.get(name, -1) for name in _alike(now)]
    return None if -1 in rows else rows


def difference(saved: Sequence[str], now: Sequence[str]) -> str:
    """Lines that tell two lists of classes apart."""
    lines = []
    for where, names, others in (("weights", saved, now), ("data", now, saved)):
        known = set(_alike(others))
        only = [name for name in names if _alike([name])[0] not in known]
        if only:
            lines.append(f"  only in the {where} ({len(only)} of {len(names)}): {_shown(only)}")
    for where, names in (("weights", saved), ("data", now)):
        lines.append(f"  order of the {where}: {_shown(names)}")
    return "\n".join(lines)


def check_same(saved: Sequence[str], now: Sequence[str], path: object) -> None:
    """Raise CheckpointError where a run would go on with other classes."""
    if saved and not same(saved, now):
        raise CheckpointError(
            f"{path} was trained with other classes than those of the data, and a class is known "
            f"by its place in the list:\n{difference(saved, now)}\n"
            "Give the folders the names of before, or start a new run with another --tag, from "
            "these weights with --pretrained (it gets a new head)"
        )


def check_outputs(saved: Sequence[str], count: int, path: object) -> None:
    """Raise CheckpointError where a head has not one output for each of its class names."""
    if saved and count != len(saved):
        raise CheckpointError(
            f"{path}: expected a head of {len(saved)} outputs, one for each class that the file "
            f"lists, got {count}"
        )


def _alike(names: Sequence[str]) -> list[str]:
    """Names with one encoding of accents: file systems differ in it."""
    return [unicodedata.normalize("NFC", name) for name in names]


def _shown(names: Sequence[str]) -> str:
    """Some names in one line that every terminal can print."""
    return first([name.encode("utf-8", "backslashreplace").decode() for name in names], 8)
