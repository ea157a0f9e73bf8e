"""Checkpoints: dicts of tensors and plain values, read without running code.

| key | value |
|---|---|
| format | 2 |
| model, ema | state dicts; ema is None where no average is kept |
| optimizer, scaler | AdamW with its learning rates, loss scaling |
| updates | optimizer steps so far: the step of the schedule and of the average |
| skipped, bad_in_row | steps left out for a gradient that was not finite; those in a row till now |
| epoch | epochs completed and validated |
| step, images | in the epoch after these: batches of each rank, images of all ranks so far |
| metrics | {"model": {...}, "ema": {...}} of the last validation, {} before the first |
| best | {"top1", "epoch", "weights"} of the best validation, {} before the first |
| ranks | for each rank its random generators ("rng") and the sums of the next log line ("window") |
| layout | {"ranks", "batch", "accum"}: processes, images of one per step, steps per update |
| config, versions | the configuration as nested plain dicts; commit and library versions |

The file is one of torch.save. Its ZIP comment is "sha256:" and the checksum of all that is before,
taken with a comment of length 0. Read by `read`, which checks it; written in utils.writer.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

FORMAT = 2
LAST, BEST = "last.pth", "best.pth"
_KEYS = (
    *("model", "ema", "optimizer", "scaler", "updates", "skipped", "bad_in_row"),
    *("epoch", "step", "images", "metrics", "best", "ranks", "layout"),
)
_HEAD = "head.fc."
_SUM = b"sha256:"
_TAIL = 2 + len(_SUM) + 64  # length of the comment, then the comment
_CHUNK = 1 << 20
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


def older(path: Path, number: int) -> Path:
    """The name of the file that was `path` so many saves ago: last.pth, last.1.pth, ..."""
    return path.with_suffix(f".{number}{path.suffix}") if number else path


def sum_comment(digest: hashlib._Hash) -> bytes:
    """The end of a file of ours: the length of the ZIP comment, and the comment."""
    comment = _SUM + digest.hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def _check_sum(path: Path) -> bool:
    """Compare the checksum in the file with its bytes; False where it has none.

    Raises CheckpointError where they differ.
    """
    left = path.stat().st_size - _TAIL
    if left < 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(left)
        tail = file.read()
        if not tail[2:].startswith(_SUM):
            return False
        file.seek(0)
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    digest.update(b"\0\0")
    if tail != sum_comment(digest):
        raise CheckpointError(
            f"{path} is damaged: its bytes do not have the checksum that was written with them"
        )
    return True


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
    summed = _check_sum(path)
    if not _is_zip(path):
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
    if payload.get("format") == FORMAT and not summed:
        raise CheckpointError(f"{path} is damaged: its checksum is missing")
    return payload


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def newest_run(folder: Path) -> tuple[Path, list[str]] | None:
    """The newest checkpoint in `folder` that is whole, and why newer ones are not used.

    None where there is no checkpoint. Raises CheckpointError where there are some, all damaged.
    """
    pattern = re.compile(rf"{Path(LAST).stem}\.(\d+)\{Path(LAST).suffix}")
    numbers = [int(m[1]) for m in map(pattern.fullmatch, _names(folder)) if m]
    paths = [older(folder / LAST, number) for number in (0, *sorted(numbers))]
    paths = [path for path in paths if path.exists()]
    refused = []
    for path in paths:
        try:
            read_run(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            return path, refused
    if refused:
        raise CheckpointError(
            "no checkpoint of this run can be used (another --tag starts anew):\n  "
            + "\n  ".join(refused)
        )
    return None


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def read_run(path: str | Path) -> dict[str, object]:
    """The checkpoint of a run, to continue it. Raises CheckpointError also for mere weights."""
    payload = read(path)
    missing = [key for key in _KEYS if key not in payload]
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
    judged = {**found, "metrics": payload.get("metrics")}
    wanted = better_weights(judged) if weights == "auto" else weights
    if wanted not in found:
        raise CheckpointError(
            f"{path}: expected {'model' if weights == 'auto' else weights} weights, "
            f"got keys {_first([str(key) for key in payload])}"
        )
    return wanted, {_unwrapped(key): value for key, value in found[wanted].items()}


def better_weights(payload: Mapping[str, object]) -> str:
    """ "model" or "ema": the one with the better top-1 in `payload`, where unknown the average."""
    if not payload.get("ema"):
        return "model"
    metrics = payload.get("metrics")
    if payload.get("model") and isinstance(metrics, Mapping) and {"model", "ema"} <= set(metrics):
        return "ema" if metrics["ema"]["top1"] >= metrics["model"]["top1"] else "model"
    return "ema"


def _unwrapped(key: str) -> str:
    for prefix in _WRAPPERS:
        key = key.removeprefix(prefix)
    return key
