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

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from torch import Tensor

from quadmamba.configs import ConfigError, Parser, load_cfg, path_argument
from quadmamba.models import ReleaseError, build_model, from_release, to_release
from quadmamba.models.release import BODY, CLASSIFIER, read_architecture
from quadmamba.utils.checkpoint import load_pretrained
from quadmamba.utils.classes import check_outputs, names_in
from quadmamba.utils.console import lasting_console
from quadmamba.utils.formats import CheckpointError, first, read_foreign
from quadmamba.utils.weights import Parts, check_values, find_weights
from quadmamba.utils.writer import save_alone, save_file, write_tensors

_OFFICIAL = Parts(frozenset(BODY), frozenset(CLASSIFIER))
_TITLE = "# The architecture of "


def import_file(source: Path, target: Path, ema: bool) -> list[Path]:
    """Write TARGET and its YAML; returns both paths."""
    if target.suffix != ".safetensors":
        raise CheckpointError(f"OUT: expected a name that ends in .safetensors, got {target}")
    payload, foreign = read_foreign(source)
    found = find_weights(payload, _OFFICIAL, source, foreign)
    kind = "ema" if ema else "model"
    if kind not in found:
        wanted = "'model_ema'" if ema else "'model' (the average is taken with --ema)"
        keys = first([str(key) for key in payload])
        raise CheckpointError(f"{source}: expected tensors under {wanted}, got keys {keys}")
    for note in found[kind].notes():
        print(f"{source}: {note}", file=sys.stderr)
    check_values(found[kind].state, str(source))
    model = from_release(found[kind].state)
    if model.in_chans != 3:
        raise ReleaseError(f"{source}: expected 3 input channels, got {model.in_chans}")
    names = names_in(payload, source)
    check_outputs(names, model.num_classes, source)
    lines = yaml.safe_dump(
        {"MODEL": describe(to_release(model), target.stem)},
        sort_keys=False,
        default_flow_style=None,
    )
    yaml_path = target.with_suffix(".yaml")
    _check_free(yaml_path)
    state, about = model.state_dict(), {"weights": kind} | ({"classes": names} if names else {})
    save_file(target, lambda path: write_tensors(path, state, about))
    title = f"{_TITLE}{target.name}, imported from {source.name}.\n"
    save_file(yaml_path, lambda path: path.write_text(title + lines))
    return [target, yaml_path]


def _check_free(path: Path) -> None:
    """Raise CheckpointError where an import would replace a configuration that it did not write."""
    if path.is_file() and not path.read_bytes().startswith(_TITLE.encode()):
        raise CheckpointError(f"OUT: {path} would be written too, and is there: give another name")


def describe(state: Mapping[str, Tensor], name: str) -> dict[str, object]:
    """The keys of MODEL for an official state dict."""
    found = read_architecture(state)
    names = ("num_classes", "dims", "depths", "orders", "ssm_ratio", "d_state", "mlp_ratio")
    return {"NAME": name, **{key.upper(): found[key] for key in names}}


def export_file(source: Path, target: Path, cfg_path: Path, ema: bool) -> list[Path]:
    """Write the weights of one of our checkpoints under official names; returns the path."""
    cfg = load_cfg(cfg_path)
    payload, foreign = read_foreign(source)
    model = build_model(cfg)
    found = find_weights(payload, Parts.of(model), source, foreign).values()
    heads = [weights.state.get("head.fc.bias", model.head.fc.bias) for weights in found]
    model = build_model(cfg, heads[0].numel())
    weights = "ema" if ema else "auto"
    print(f"loaded {load_pretrained(model, source, adapt_head=False, weights=weights)}")
    names = names_in(payload, source)
    state = {key: value.clone() for key, value in to_release(model).items()}
    save_alone(target, {"model": state} | ({"classes": list(names)} if names else {}))
    return [target]


@lasting_console()
def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=path_argument, metavar="IN")
    parser.add_argument("target", type=path_argument, metavar="OUT")
    parser.add_argument("--ema", action="store_true", help="take the average of the weights")
    parser.add_argument("--export", action="store_true", help="from our names to the official ones")
    parser.add_argument(
        "--cfg", type=path_argument, metavar="YAML", help="configuration, for --export"
    )
    args = parser.parse_args(argv)
    if args.export != (args.cfg is not None):
        parser.error("--export and --cfg go together")
    try:
        if args.target.exists() and args.source.exists() and args.target.samefile(args.source):
            raise CheckpointError(f"OUT: expected another file than IN, got {args.target} twice")
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
