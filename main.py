"""The menu: train (default) | --eval | --throughput | --info.

    python main.py --cfg configs/quadmamba_small.yaml --data-path DATA --output OUT
    torchrun --nproc-per-node 8 main.py --cfg configs/quadmamba_small.yaml --data-path DATA

Exit codes: 0 done; 1 a crash, with a traceback; 2 wrong input, data or disk, with a message;
3 saved and ended by a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP), start again to go on; 128 + N a
second signal N.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from yacs.config import CfgNode

import quadmamba
from quadmamba.configs import ConfigError, Parser, key_table, load_cfg, packaged
from quadmamba.utils.console import check_printed, lasting_console
from quadmamba.utils.files import OutputError
from quadmamba.utils.launch import DeviceError, Place, place_from_env, run_and_leave, stop

# Modes beside training, and what they print
ASIDE = {
    "eval": "accuracy of --pretrained",
    "throughput": "images per second on random images",
    "info": "parameters and multiply-adds",
}
# Flag, the configuration key that it spells, type, help
FLAGS = (
    ("--data-path", "DATA.PATH", str, "folder that holds train/ and val/"),
    ("--batch-size", "DATA.BATCH_SIZE", int, "images per process and step"),
    ("--img-size", "DATA.IMG_SIZE", int, "side of the images in pixels"),
    ("--workers", "DATA.WORKERS", int, "loader processes per rank"),
    ("--output", "OUTPUT", str, "results go to OUTPUT/MODEL.NAME/TAG"),
    ("--tag", "TAG", str, "name of the run"),
    ("--pretrained", "TRAIN.PRETRAINED", str, "weights to start from or to evaluate"),
    ("--resume", "TRAIN.RESUME", str, "checkpoint of a run to continue"),
    ("--epochs", "TRAIN.EPOCHS", int, "passes over the training set"),
    ("--seed", "TRAIN.SEED", int, "seed of every random generator"),
    ("--compile", "TRAIN.COMPILE", str, "off, graph, or a mode of torch.compile"),
    ("--device", "DEVICE", str, "auto, cpu or cuda"),
)


def parse(argv: Sequence[str] | None) -> dict[str, object]:
    """The flags of a command line; an unknown one exits with 2."""
    keys = f"Keys and defaults, for --opts and YAML files:\n{key_table()}"
    parser = Parser(__doc__, epilog=keys, argument_default=argparse.SUPPRESS)
    parser.add_argument("--cfg", metavar="YAML", help="a file, or a name as digits")
    modes = parser.add_mutually_exclusive_group()
    for mode, text in ASIDE.items():
        modes.add_argument(f"--{mode}", dest="MODE", action="store_const", const=mode, help=text)
    for flag, key, kind, text in FLAGS:
        metavar = flag.lstrip("-").replace("-", "_").upper()
        parser.add_argument(flag, dest=key, type=kind, metavar=metavar, help=f"{text} ({key})")
    parser.add_argument("--opts", nargs="+", action="extend", metavar="KEY VALUE", help="any keys")
    parser.add_argument("--local-rank", "--local_rank", type=int, help="ignored: LOCAL_RANK counts")
    return vars(parser.parse_args(argv))


def configure(flags: dict[str, object]) -> CfgNode:
    """The configuration of the flags of a command line. Raises ConfigError."""
    path, opts = flags.pop("cfg", None), flags.pop("opts", [])
    flags.pop("local_rank", None)
    if path is None:
        names = "\n".join(f"  {name}" for name in packaged())
        raise ConfigError(
            f"--cfg: expected a YAML file or the name of one, got none; there are\n{names}"
        )
    cfg = load_cfg(path, flags, opts)
    if cfg.MODE == "eval" and not (cfg.TRAIN.PRETRAINED or cfg.TRAIN.RESUME):
        raise ConfigError("--eval: expected weights, got none; give them with --pretrained CKPT")
    return cfg


def info(cfg: CfgNode) -> None:
    """Print parameters and multiply-adds; the last line is one JSON object. Needs no data."""
    from quadmamba.models import build_model
    from quadmamba.utils.complexity import one_thread, report

    with one_thread():
        counts = report(build_model(cfg), cfg.DATA.IMG_SIZE)
    print(f"{cfg.MODEL.NAME}\n{counts.table()}")
    line = {"model": cfg.MODEL.NAME, "params": counts.params, "gmacs": round(counts.gmacs, 4)}
    print(json.dumps({**line, "img_size": cfg.DATA.IMG_SIZE}))
    check_printed()


@lasting_console()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code. What a mode needs is imported when it is chosen."""
    flags, place = parse(argv), Place()
    try:
        place = place_from_env()
        if place.is_main:
            warn_of_other_copy()
        cfg = configure(flags)
        if cfg.MODE == "info":
            if place.is_main:
                info(cfg)
            return 0
    except (ConfigError, DeviceError, OutputError) as error:
        return stop(error if place.local_rank == 0 else None)  # the same on all ranks of a node
    from quadmamba.utils.modes import run_mode

    return run_mode(cfg, place)


def warn_of_other_copy() -> None:
    """Say it where this file, run as a script, is not of the package that is installed."""
    here, package = Path(__file__).resolve().parent, Path(quadmamba.__file__).resolve().parent
    if here != package:
        print(
            f"warning: running the quadmamba in {package}; changes in {here} are not seen "
            f"(pip install -e {here})",
            file=sys.stderr,
        )


def program() -> NoReturn:
    """The program as a process: what `python main.py` and the command `quadmamba` run."""
    run_and_leave(main)


if __name__ == "__main__":
    program()
