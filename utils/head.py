"""The head of weights for the classes of the data: taken, put in order by name, or fresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quadmamba.utils.classes import check_outputs, difference, rows_of, same
from quadmamba.utils.formats import CheckpointError, first
from quadmamba.utils.weights import HEAD, check_values

_OUTPUTS = f"{HEAD}.fc."  # names of the tensors with a row for each class


@dataclass(frozen=True)
class Fitted:
    """Weights with a head for the data.

    state: what to load. fresh: names of the model's tensors that keep their fresh values. notes:
    what to tell of it.
    """

    state: dict[str, Tensor]
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def fit_head(
    model: nn.Module,
    state: dict[str, Tensor],
    saved: Sequence[str],
    classes: Sequence[str],
    *,
    adapt: bool,
    path: object,
) -> Fitted:
    """Fit the head of `state` to `classes`, the data's in the order of their numbers.

    saved: the names of the head's outputs. Where the data's are among them, its rows are picked by
    name; where either is unknown (), their order is taken to be the same.
    adapt: to train on; a head that is missing, of another size or for other classes is left at the
    model's fresh values then. Without it that is a CheckpointError, except that classes may lack in
    the data.
    """
    own = model.state_dict()
    outputs = {key: state[key] for key in own if key.startswith(_OUTPUTS) and key in state}
    if not outputs:
        if not adapt:
            raise CheckpointError(
                f"{path}: expected weights with a classifier ({_OUTPUTS}weight), got a backbone "
                "alone; it can be trained on with --pretrained, which adds a fresh head"
            )
        return _with_fresh_head(own, state, "the file has none")
    for value in outputs.values():
        check_outputs(saved, len(value) if value.dim() else 1, path)
    if saved and classes:
        if same(saved, classes):
            return Fitted(state)
        return _by_name(own, state, outputs, saved, classes, adapt=adapt, path=path)
    return _in_order(own, state, outputs, classes, adapt=adapt, path=path)


def _in_order(
    own: Mapping[str, Tensor],
    state: dict[str, Tensor],
    outputs: Mapping[str, Tensor],
    classes: Sequence[str],
    *,
    adapt: bool,
    path: object,
) -> Fitted:
    """The head of a file without class names: its outputs are taken for the data's classes."""
    misfit = [
        f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
        for key, value in outputs.items()
        if value.shape != own[key].shape
    ]
    if adapt and misfit:
        return _with_fresh_head(own, state, f"its shape differs: {first(misfit)}")
    if classes and any(len(value) != len(classes) for value in outputs.values() if value.dim()):
        raise CheckpointError(
            f"{path}: {len(misfit)} of another shape: {first(misfit)}. The data have "
            f"{len(classes)} classes, and the file does not name its own, to pick them by name; "
            "to train on these with a new head use --pretrained"
        )
    unnamed = "it names no classes: its outputs are taken for the data's in sorted order"
    return Fitted(state, notes=(unnamed,) if classes and not misfit else ())


def _by_name(
    own: Mapping[str, Tensor],
    state: dict[str, Tensor],
    outputs: Mapping[str, Tensor],
    saved: Sequence[str],
    classes: Sequence[str],
    *,
    adapt: bool,
    path: object,
) -> Fitted:
    """The rows of the head in the order of the data's classes."""
    rows = rows_of(saved, classes)
    if adapt and (rows is None or len(saved) != len(classes)):
        reason = f"the weights are for other classes:\n{difference(saved, classes)}"
        return _with_fresh_head(own, state, reason)
    if rows is None:
        raise CheckpointError(
            f"{path} was trained with other classes than those of the data:\n"
            f"{difference(saved, classes)}\n"
            "Give the folders the names that the weights know (some may lack, the outputs are "
            "picked by name), or train a new head for these with --pretrained"
        )
    check_values(outputs, str(path))  # not of all tensors can rows be picked
    picked = {key: value[torch.tensor(rows)] for key, value in outputs.items()}
    told = f"{len(classes)} of its {len(saved)} classes, in the data's order, picked by name"
    return Fitted({**state, **picked}, notes=(told,))


def _with_fresh_head(own: Mapping[str, Tensor], state: dict[str, Tensor], reason: str) -> Fitted:
    """The weights without the old head; its norm is taken where there is one."""
    head = [key for key in own if key.startswith(f"{HEAD}.")]
    norm = [key for key in head if not key.startswith(_OUTPUTS)]
    kept = norm if any(key in state for key in norm) else []
    rest = {key: v for key, v in state.items() if not key.startswith(f"{HEAD}.") or key in kept}
    return Fitted(
        rest,
        tuple(key for key in head if key not in kept),
        (f"new head with fresh values, {reason}",),
    )
