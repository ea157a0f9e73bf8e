"""Checkpoints: dicts of tensors and plain values, written atomically, read without running code.

| key | value |
|---|---|
| format | 1 |
| model, ema | state dicts; ema is None where no average is kept |
| optimizer, scaler, updates | AdamW, loss scaling, and the number of optimizer steps so far |
| epoch | epochs completed |
| metrics | {"model": {...}, "ema": {...}} of the last validation, {} before the first |
| best | {"top1", "epoch", "weights"} of the best validation, {} before the first |
| config, versions | the configuration as nested plain dicts; versions of what computed it |
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

FORMAT = 1
LAST, BEST = "last.pth", "best.pth"
_HEAD = "head.fc."
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used; the message says what to do."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did.

    path, source: the file, and which of its weights ("model" or "ema"). loaded: tensors taken.
    adapted: tensors of the head that start anew. config: the configuration in the file, or {}.
    """

    path: str
    source: str
    loaded: int
    adapted: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.source} weights of {self.path}"
        if self.adapted:
            text += f"; new head, its shape differs: {', '.join(self.adapted)}"
        return text


def plain(tree: Mapping[str, object]) -> dict[str, object]:
    """A configuration node as nested plain dicts."""
    return {key: plain(v) if isinstance(v, Mapping) else v for key, v in tree.items()}


def save(path: Path, payload: Mapping[str, object]) -> None:
    """Write `payload` so that `path` is at any moment the old file or the whole new one.

    Raises CheckpointError where the folder or the disk does not take it; `path` is then as it was.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            torch.save(dict(payload), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(f"cannot write {path}: {error}; the file before is kept") from error


def read(path: str | Path) -> dict[str, object]:
    """The dict in a file of torch.save, or the tensors of a .safetensors file; runs no code.

    Raises CheckpointError where there is no file, or where it is cut off, no checkpoint or holds
    more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a checkpoint, or it is cut off: expected a whole file written by "
            "torch.save or a .safetensors file"
        )
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds something else than tensors and plain values; it was not loaded, since "
            "that can run code. Expected a checkpoint of this project or a state dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {first}") from error
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(payload).__name__}")
    return payload


def read_run(path: str | Path) -> dict[str, object]:
    """The checkpoint of a run, to continue it. Raises CheckpointError also for mere weights."""
    payload = read(path)
    expected = ("model", "ema", "optimizer", "scaler", "updates", "epoch", "metrics", "best")
    missing = [key for key in expected if key not in payload]
    if payload.get("format") != FORMAT or missing:
        raise CheckpointError(
            f"{path}: expected a checkpoint of a run, format {FORMAT}, got format "
            f"{payload.get('format')} without {', '.join(missing) or 'nothing'}; "
            "to start a new run from weights use --pretrained"
        )
    return payload


def load_pretrained(
    model: nn.Module, path: str | Path, *, adapt_head: bool, weights: str = "auto"
) -> LoadReport:
    """Load weights: a checkpoint of a run, a state dict, {"model": state dict} or .safetensors.

    weights: "model", "ema", or "auto": of a checkpoint that holds both, the ones with the better
    top-1 in it, else the average. adapt_head: leave a classifier of another size at its fresh
    values and report it.
    Raises CheckpointError where keys are missing, unexpected or of another shape; the model is then
    unchanged.
    """
    payload = read(path)
    source, state = _pick(payload, weights, path)
    adapted = _adapted(model, state) if adapt_head else ()
    kept = {key: value for key, value in state.items() if key not in adapted}
    load_weights(model, kept, f"{path} ({source})", fresh=adapted)
    config = payload.get("config")
    return LoadReport(
        str(path), source, len(kept), adapted, config if isinstance(config, Mapping) else {}
    )


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], where: str, *, fresh: Sequence[str] = ()
) -> None:
    """Load every tensor of `model` except those in `fresh`.

    Raises CheckpointError, and changes nothing, where names or shapes do not fit.
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
        lines += [f"  {len(v)} {kind}: {_first(v)}" for kind, v in wrong.items() if v]
        lines.append(
            "expected weights of this very model: is --cfg the one they were trained with?"
        )
        raise CheckpointError("\n".join(lines))
    model.load_state_dict({**own, **state})


def _first(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _adapted(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    own = model.state_dict()
    head = [key for key in own if key.startswith(_HEAD) and key in state]
    return tuple(key for key in head if state[key].shape != own[key].shape)


def _as_state(value: object) -> Mapping[str, Tensor]:
    """`value` where it is a state dict, else an empty one."""
    if isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values()):
        return value
    return {}


def _pick(
    payload: Mapping[str, object], weights: str, path: str | Path
) -> tuple[str, dict[str, Tensor]]:
    """The name and the state dict of the weights to take from a file's content."""
    found = {name: _as_state(payload.get(name)) for name in ("model", "ema")}
    if not any(found.values()):
        found["model"] = _as_state(payload)
    found = {name: state for name, state in found.items() if state}
    wanted = _better(payload, found) if weights == "auto" else weights
    if wanted not in found:
        raise CheckpointError(
            f"{path}: expected {'model' if weights == 'auto' else weights} weights, "
            f"got keys {_first([str(key) for key in payload])}"
        )
    return wanted, {_unwrapped(key): value for key, value in found[wanted].items()}


def _better(payload: Mapping[str, object], found: Mapping[str, object]) -> str:
    if "ema" not in found:
        return "model"
    metrics = payload.get("metrics")
    if "model" in found and isinstance(metrics, Mapping) and {"model", "ema"} <= set(metrics):
        return "ema" if metrics["ema"]["top1"] >= metrics["model"]["top1"] else "model"
    return "ema"


def _unwrapped(key: str) -> str:
    for prefix in _WRAPPERS:
        key = key.removeprefix(prefix)
    return key
