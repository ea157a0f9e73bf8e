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
| classes | the names of the classes in the order of the outputs; files of before have none |
| data | {"training", "validation"}: numbers of images |
| config, versions | the configuration as nested plain dicts; commit and library versions |

The file is one of torch.save. Its ZIP comment is "sha256:" and the checksum of all that is before,
taken with a comment of length 0. Read by `read`, which checks it; written in utils.writer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from quadmamba.utils.classes import names_in
from quadmamba.utils.files import older
from quadmamba.utils.formats import FORMAT, CheckpointError, first, read, read_foreign
from quadmamba.utils.head import fit_head
from quadmamba.utils.weights import Parts, find_weights, load_weights

LAST, BEST = "last.pth", "best.pth"
_KEYS = (
    *("model", "ema", "optimizer", "scaler", "updates", "skipped", "bad_in_row"),
    *("epoch", "step", "images", "metrics", "best", "ranks", "layout"),
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did.

    path, source: the file, and which of its weights ("model" or "ema"). loaded: tensors taken.
    adapted: tensors of the head that start anew. notes: what else to tell. config: the
    configuration in the file, or {}.
    """

    path: str
    source: str
    loaded: int
    adapted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.source} weights of {self.path}"
        return "; ".join([text, *self.notes])


def plain(tree: Mapping[str, object]) -> dict[str, object]:
    """A configuration node as nested plain dicts."""
    return {key: plain(v) if isinstance(v, Mapping) else v for key, v in tree.items()}


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
    model: nn.Module,
    path: str | Path,
    *,
    adapt_head: bool,
    weights: str = "auto",
    classes: Sequence[str] = (),
) -> LoadReport:
    """Load weights from a file of any of the layouts that `find_weights` knows.

    weights: "model", "ema", or "auto": of a file that holds both, the ones with the better top-1 in
    it, else the average. adapt_head, classes: see `fit_head`.
    Raises CheckpointError where names, shapes, values or classes do not fit; the model is then
    unchanged.
    """
    payload, foreign = read_foreign(path)
    found = find_weights(payload, Parts.of(model), path, foreign)
    judged = {**dict.fromkeys(found, True), "metrics": payload.get("metrics")}
    source = better_weights(judged) if weights == "auto" else weights
    if source not in found:
        keys = first([str(key) for key in payload])
        raise CheckpointError(f"{path}: expected {source} weights, got keys {keys}")
    chosen = found[source]
    head = fit_head(
        model, chosen.state, names_in(payload, path), classes, adapt=adapt_head, path=path
    )
    load_weights(model, head.state, f"{path} ({source})", fresh=head.fresh)
    config = payload.get("config")
    return LoadReport(
        str(path),
        source,
        len(head.state),
        head.fresh,
        (*chosen.notes(), *head.notes),
        config if isinstance(config, Mapping) else {},
    )


def better_weights(payload: Mapping[str, object]) -> str:
    """ "model" or "ema": the one with the better top-1 in `payload`, where unknown the average."""
    if not payload.get("ema"):
        return "model"
    if not payload.get("model"):
        return "ema"
    with contextlib.suppress(KeyError, TypeError):  # unknown
        metrics = payload["metrics"]
        return "ema" if metrics["ema"]["top1"] >= metrics["model"]["top1"] else "model"
    return "ema"
