"""The weights of a model in the dict of a file: where they are, under which names, and loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quadmamba.models.release import BODY
from quadmamba.utils.formats import CheckpointError, first, whole_object

HEAD = "head"  # the part of a model that knows classes
# Parts of names that wrappers put in: DistributedDataParallel, torch.compile, FSDP, checkpointing
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Tensors that averages (of PyTorch, mmengine) and FLOP counters put beside weights
_COUNTERS = {"n_averaged", "steps", "total_ops", "total_params"}
_AVERAGES = {"ema", "swa", "average", "averaged", "teacher"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEPTH = 8  # of dicts in dicts that are searched


@dataclass(frozen=True)
class Parts:
    """First words of the names of a model's weights: those that every model has, and the head's."""

    body: frozenset[str]
    head: frozenset[str] = frozenset((HEAD,))

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """Those of `model`."""
        return cls(frozenset(key.partition(".")[0] for key in model.state_dict()) - {HEAD})


@dataclass
class Weights:
    """A set of weights in a file. prefix: the words before their names there.

    state: tensors by the model's names. beside: names of other tensors of the same state dict.
    """

    prefix: tuple[str, ...]
    state: dict[str, Tensor] = field(default_factory=dict)
    places: set[tuple[str, ...]] = field(default_factory=set)
    beside: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Where they stood, and what was left out beside them."""
        told = []
        if all(_unwrapped(place) != self.prefix for place in self.places):
            told.append(f"found under {'.'.join(self.prefix)}")
        if self.beside:
            told.append(f"{len(self.beside)} tensors beside them left out: {first(self.beside)}")
        return told

    def has(self, words: frozenset[str]) -> int:
        """How many of these words its names begin with."""
        return len(words & {key.partition(".")[0] for key in self.state})


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file: the keys of the dicts around it, its key, and the words of all these."""

    place: tuple[str, ...]
    key: str
    words: tuple[str, ...]
    value: Tensor


def find_weights(
    payload: Mapping[str, object], parts: Parts, path: object, foreign: Sequence[str] = ()
) -> dict[str, Weights]:
    """The weights of a model and their average in a file's content, as "model" and "ema".

    Dicts in dicts and names with prefixes are the same: {"state_dict": {"model.stem.0.weight"}}.
    Words of wrappers are left out wherever they stand; the words before the first of `parts` are
    the prefix. Weights are an average where a word of the prefix says so (ema, swa, average,
    teacher). A head that stands one prefix up belongs to them, where they have none.
    foreign: what the file holds beside tensors and plain values.
    Raises CheckpointError where there are none, or two of a kind.
    """
    entries = list(_entries(payload))
    found = _grouped(entries, parts, path)
    kinds: dict[str, list[Weights]] = {}
    for weights in _candidates(found, parts):
        kinds.setdefault("ema" if _is_average(weights, payload) else "model", []).append(weights)
    if not kinds:
        raise CheckpointError(_none_found(payload, entries, parts, path, foreign))
    for same in kinds.values():
        if len(same) > 1:
            names = ", ".join(".".join(weights.prefix) or "(no prefix)" for weights in same)
            raise CheckpointError(
                f"{path} holds {len(same)} sets of weights: {names}; expected one, and at most one "
                "average of it (with ema, swa, average or teacher in its name). Save the one to "
                "take in a file of its own"
            )
    chosen = {kind: same[0] for kind, same in kinds.items()}
    for weights in chosen.values():
        _take_head(weights, found, parts)
    taken = {id(value) for weights in chosen.values() for value in weights.state.values()}
    rest = [entry for entry in entries if id(entry.value) not in taken]
    for weights in chosen.values():
        _sort_rest(weights, rest)
    return chosen


def _entries(tree: Mapping, place: tuple[str, ...] = ()) -> Iterator[_Entry]:
    """Each tensor in nested dicts, but for those of an optimizer."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if len(place) < _DEPTH and not str(key).startswith("optim"):
                yield from _entries(value, (*place, str(key)))
        elif isinstance(value, Tensor):
            words = _unwrapped((*place, *str(key).split(".")))
            if words and words[-1] not in _COUNTERS:
                yield _Entry(place, str(key), words, value)


def _unwrapped(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for word in words if word not in _WRAPPERS)


def _grouped(
    entries: Sequence[_Entry], parts: Parts, path: object
) -> dict[tuple[str, ...], Weights]:
    """The tensors with a word of `parts`, by what is before it."""
    found: dict[tuple[str, ...], Weights] = {}
    for entry in entries:
        at = next((i for i, w in enumerate(entry.words) if w in parts.body | parts.head), None)
        if at is None:
            continue
        prefix, name = entry.words[:at], ".".join(entry.words[at:])
        weights = found.setdefault(prefix, Weights(prefix))
        if name in weights.state:
            raise CheckpointError(f"{path}: expected each tensor once, got {name} under two names")
        weights.state[name] = entry.value
        weights.places.add(entry.place)
    return found


def _candidates(found: Mapping[tuple[str, ...], Weights], parts: Parts) -> list[Weights]:
    """Those with all parts of the model, else those with some, never those with a head alone."""
    some = [weights for weights in found.values() if weights.has(parts.body)]
    whole = [weights for weights in some if weights.has(parts.body) == len(parts.body)]
    return whole or some


def _is_average(weights: Weights, payload: Mapping[str, object]) -> bool:
    named = any(_AVERAGES & set(word.lower().split("_")) for word in weights.prefix)
    if {"message_hub", "ema_state_dict"} <= set(payload):  # of mmengine, which swaps the two
        return weights.prefix[:1] == ("state_dict",)
    return named


def _take_head(weights: Weights, found: Mapping[tuple[str, ...], Weights], parts: Parts) -> None:
    """Add the head that stands beside a backbone, one prefix up."""
    above = found.get(weights.prefix[:-1])
    if weights.prefix and above and not weights.has(parts.head) and not above.has(parts.body):
        weights.state.update(above.state)


def _sort_rest(weights: Weights, rest: Sequence[_Entry]) -> None:
    """Other tensors of the same dict: those under the same prefix count as the model's."""
    length = len(weights.prefix)
    for entry in rest:
        if entry.place not in weights.places:
            continue
        if entry.words[:length] == weights.prefix:
            weights.state[".".join(entry.words[length:])] = entry.value
        else:
            weights.beside.append(entry.key)


def _none_found(
    payload: Mapping[str, object],
    entries: Sequence[_Entry],
    parts: Parts,
    path: object,
    foreign: Sequence[str],
) -> str:
    """What is wrong with a file without weights of this model."""
    if not entries and foreign:
        return f"{path} {whole_object(list(foreign))}"
    wanted = ", ".join(f"{name}.*" for name in sorted(parts.body))
    names = [entry.key for entry in entries]
    got = f"tensors with keys such as {first(names)}" if names else "no tensor"
    keys = first([str(key) for key in payload])
    text = f"{path}: expected model weights, named {wanted}, got keys {keys or '(none)'}: {got}"
    if set(BODY) <= {word for entry in entries for word in entry.words}:
        text += "\nThese are official names: python -m quadmamba.tools.import_release converts them"
    return text


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], where: str, *, fresh: Sequence[str] = ()
) -> None:
    """Load every tensor of `model` except those in `fresh`, in the model's own floating type.

    Raises CheckpointError, and changes nothing, where names, shapes or values do not fit.
    """
    own = model.state_dict()
    wrong = {
        "missing": [key for key in own if key not in state and key not in fresh],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    if any(wrong.values()):
        lines = [f"{where} does not fit the model ({len(own)} tensors):"]
        lines += [f"  {len(v)} {kind}: {first(v)}" for kind, v in wrong.items() if v]
        lines.append(
            "expected weights of this very model: is --cfg the one they were trained with?"
        )
        raise CheckpointError("\n".join(lines))
    check_values(state, where)
    model.load_state_dict({**own, **state})


def check_values(state: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError for tensors that are no dense floating numbers, or not finite."""
    strange = [f"{key} ({kind})" for key, value in state.items() if (kind := _strange(value))]
    if strange:
        raise CheckpointError(
            f"{where}: expected dense tensors of floating numbers, got {len(strange)} others: "
            f"{first(strange)}; weights that were quantised or pruned cannot be used here"
        )
    broken = [key for key, value in state.items() if not value.float().isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{where}: {len(broken)} tensors hold NaN or infinite values: {first(broken)}; their "
            "training had diverged. Use weights from before"
        )


def _strange(value: Tensor) -> str:
    """What is unusual in a tensor, "" for nothing."""
    if value.is_meta:
        return "without values"
    if value.layout != torch.strided:
        return str(value.layout).removeprefix("torch.")
    return "" if value.dtype in _FLOATS else str(value.dtype).removeprefix("torch.")
