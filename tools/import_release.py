"""Bring an official QuadMamba or VMamba checkpoint to the names of this project, or ours to theirs.

    python tools/import_release.py official.pth small.safetensors            # the plain weights
    python tools/import_release.py official.pth small.safetensors --ema      # their average
    python tools/import_release.py best.pth official.pth --export --cfg configs/CONFIG.yaml

An import writes OUT.safetensors and OUT.yaml, a configuration of the same architecture:

    python main.py --eval --cfg small.yaml --pretrained small.safetensors --data-path DATA

Official files hold a pickled configuration beside the tensors. No code in a file is executed: what
is not a tensor or a plain value is read as a dict. Wrong input ends with exit code 2.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import yaml
from torch import Tensor

from quadmamba.configs import ConfigError, load_cfg
from quadmamba.models import ReleaseError, build_model, from_release, to_release
from quadmamba.models.release import read_architecture
from quadmamba.utils.checkpoint import CheckpointError, load_pretrained, read
from quadmamba.utils.writer import save_alone

_EMA = "model_ema"  # of the official trainer, beside "model"


class Shell:
    """Stands for any class or function that a pickle names: whatever the call, an empty dict."""

    def __new__(cls, *_: object) -> OrderedDict:  # type: ignore[misc]
        """A dict of a kind that torch's reader lets a pickle fill."""
        return OrderedDict()


def read_official(path: Path) -> dict[str, object]:
    """The dict in an official .pth file, foreign objects as plain dicts; runs no code of the file.

    Raises CheckpointError where it is missing, damaged or no such file.
    """
    try:
        return read(path)  # mere tensors
    except CheckpointError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Shell, name) for name in names]):
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read without running its code: {first}") from error
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(payload).__name__}")
    return payload


def pick(payload: Mapping[str, object], ema: bool, path: Path) -> dict[str, Tensor]:
    """The state dict of the plain weights, or of their average, in the content of a file."""
    state = payload.get(_EMA if ema else "model")
    if state is None and not ema:
        state = payload
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        wanted = _EMA if ema else "model"
        names = ", ".join([str(key) for key in payload][:8])
        raise CheckpointError(f"{path}: expected tensors under {wanted!r}, got keys {names}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def import_file(source: Path, target: Path, ema: bool) -> list[Path]:
    """Write TARGET and its YAML; returns both paths."""
    if target.suffix != ".safetensors":
        raise CheckpointError(f"OUT: expected a name that ends in .safetensors, got {target}")
    model = from_release(pick(read_official(source), ema, source))
    if model.in_chans != 3:
        raise ReleaseError(f"{source}: expected 3 input channels, got {model.in_chans}")
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    lines = yaml.safe_dump(
        {"MODEL": describe(to_release(model), target.stem)},
        sort_keys=False,
        default_flow_style=None,
    )
    paths = [target, target.with_suffix(".yaml")]
    try:
        safetensors.torch.save_file(state, target)
        paths[1].write_text(
            f"# The architecture of {target.name}, imported from {source.name}.\n{lines}"
        )
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return paths


def describe(state: Mapping[str, Tensor], name: str) -> dict[str, object]:
    """The keys of MODEL for an official state dict."""
    found = read_architecture(state)
    names = ("num_classes", "dims", "depths", "orders", "ssm_ratio", "d_state", "mlp_ratio")
    return {"NAME": name, **{key.upper(): found[key] for key in names}}


def export_file(source: Path, target: Path, cfg_path: Path, ema: bool) -> list[Path]:
    """Write the weights of one of our checkpoints under official names; returns the path."""
    cfg = load_cfg(cfg_path)
    classes = _classes(source)
    model = build_model(cfg, classes)
    weights = "ema" if ema else "auto"
    print(f"loaded {load_pretrained(model, source, adapt_head=False, weights=weights)}")
    save_alone(target, {"model": {key: value.clone() for key, value in to_release(model).items()}})
    return [target]


def _classes(source: Path) -> int | None:
    """The number of classes of one of our checkpoints, None where it has no classifier."""
    payload = read(source)
    states = [payload, *(v for v in payload.values() if isinstance(v, Mapping))]
    heads = [state["head.fc.weight"] for state in states if "head.fc.weight" in state]
    return len(heads[0]) if heads else None


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--ema", action="store_true", help="take the average of the weights")
    parser.add_argument("--export", action="store_true", help="from our names to the official ones")
    parser.add_argument("--cfg", type=Path, metavar="YAML", help="configuration, for --export")
    args = parser.parse_args(argv)
    if args.export != (args.cfg is not None):
        parser.error("--export and --cfg go together")
    try:
        if args.export:
            paths = export_file(args.source, args.target, args.cfg, args.ema)
        else:
            paths = import_file(args.source, args.target, args.ema)
    except (ConfigError, CheckpointError, ReleaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
