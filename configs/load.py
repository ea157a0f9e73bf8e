"""Read, merge and check a configuration."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from yacs.config import CfgNode

from quadmamba.configs.defaults import _C
from quadmamba.configs.settings import Setting, read_opts, read_yaml, sections_of
from quadmamba.configs.values import ConfigError, check_name, convert, user_path

ORDERS = ("quadtree", "release", "raster", "window")
_PACKAGED = Path(__file__).parent
_MAX_MINUTES = 1_000_000  # of a time-out; torch counts it in milliseconds
_CHOICES = {
    "MODEL.SELECTION": ("predictor", "random", "first"),
    "MODE": ("train", "eval", "throughput", "info"),
    "DEVICE": ("auto", "cpu", "cuda"),
    "DATA.ON_ERROR": ("raise", "skip"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear"),
    "TRAIN.AMP": ("bf16", "fp16", "off"),
    "TRAIN.COMPILE": ("off", "graph", "default", "reduce-overhead", "max-autotune"),
    "AUG.REMODE": ("pixel", "rand", "const"),
}
_POSITIVE = (
    "DATA.IMG_SIZE",
    "DATA.BATCH_SIZE",
    "DATA.MAX_PIXELS",
    "TRAIN.EPOCHS",
    "TRAIN.ACCUM_STEPS",
    "TRAIN.SAVE_EVERY",
    "TRAIN.KEEP",
    "TRAIN.MAX_BAD_STEPS",
    "RANK_TIMEOUT",
    "DATA.TIMEOUT",
    "TRAIN.EVAL_EVERY",
    "TRAIN.BASE_LR",
    "TRAIN.EPS",
    "MODEL.WINDOW",
    "MODEL.SSM_RATIO",
    "MODEL.TAU",
    "LOG_EVERY",
    "LOG_IMAGES_EVERY",
)
_NOT_NEGATIVE = (
    "MODEL.NUM_CLASSES",
    "MODEL.MLP_RATIO",
    "DATA.WORKERS",
    "AUG.MIXUP",
    "AUG.CUTMIX",
    "AUG.COLOR_JITTER",
    "TRAIN.WARMUP_EPOCHS",
    "TRAIN.LR_BATCH",
    "TRAIN.WARMUP_LR",
    "TRAIN.MIN_LR",
    "TRAIN.WEIGHT_DECAY",
    "TRAIN.CLIP_GRAD",
    "TRAIN.SAVE_MINUTES",
    "LOG_IMAGES",
)
_FRACTIONS = (
    "MODEL.DROP_PATH",
    "DATA.CROP_RATIO",
    "AUG.HFLIP",
    "AUG.REPROB",
    "AUG.MIXUP_PROB",
    "AUG.MIXUP_SWITCH_PROB",
    "TRAIN.LABEL_SMOOTHING",
    "TRAIN.EMA_DECAY",
)


def load_cfg(
    path: str | Path | None = None,
    flags: Mapping[str, object] | None = None,
    opts: Sequence[str] = (),
) -> CfgNode:
    """Merge defaults < YAML at `path` < `flags` and `opts`, check the result and freeze it.

    path: a file, or the name of a packaged one: quadmamba_small, from any folder. flags: values by
    dotted key, as {"DATA.BATCH_SIZE": 64}. opts: KEY VALUE pairs, values as YAML.
    Raises ConfigError for a missing file, an unknown key, a wrong type, two values for one key or
    an impossible value.
    """
    cfg, file = _C.clone(), []
    if path is not None:
        file = read_yaml(_find(user_path(str(path), "--cfg")), list(_keys(cfg)))
    line = [Setting(key, value, "on the command line") for key, value in (flags or {}).items()]
    levels = [_merge(cfg, file), _merge(cfg, [*line, *read_opts(opts)])]
    check_cfg(cfg)
    _check_warmup(cfg, levels)
    cfg.freeze()
    return cfg


def packaged() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in _PACKAGED.glob("*.yaml"))


def key_table() -> str:
    """All keys and their defaults, a line each."""
    return "\n".join(f"  {key:<24} {get_key(_C, key)!r}" for key in _keys(_C))


def get_key(cfg: CfgNode, key: str) -> object:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def check_cfg(cfg: CfgNode) -> None:
    """Raise ConfigError for a value outside its range or a combination that cannot work."""
    _check_names(cfg)
    _check_values(cfg)
    _check_model(cfg.MODEL)
    _check_step(cfg)
    _check_recipe(cfg)


def _check_names(cfg: CfgNode) -> None:
    for key in ("MODEL.NAME", "TAG"):
        check_name(key, get_key(cfg, key))
    if not cfg.OUTPUT:
        raise ConfigError("OUTPUT: expected a folder, got nothing (. is the current one)")


def _check_values(cfg: CfgNode) -> None:
    for key, choices in _CHOICES.items():
        if get_key(cfg, key) not in choices:
            raise ConfigError(
                f"{key}: expected one of {', '.join(choices)}, got {get_key(cfg, key)!r}"
            )
    for key in _POSITIVE:
        if get_key(cfg, key) <= 0:
            raise ConfigError(f"{key}: expected a number above 0, got {get_key(cfg, key)}")
    for key in _NOT_NEGATIVE:
        if get_key(cfg, key) < 0:
            raise ConfigError(f"{key}: expected 0 or more, got {get_key(cfg, key)}")
    for key in _FRACTIONS:
        if not 0 <= get_key(cfg, key) <= 1:
            raise ConfigError(f"{key}: expected a number from 0 to 1, got {get_key(cfg, key)}")


def _check_model(model: CfgNode) -> None:
    for key in ("DIMS", "DEPTHS", "ORDERS"):
        if len(model[key]) != 4:
            raise ConfigError(
                f"MODEL.{key}: expected one value for each of 4 stages, got {model[key]}"
            )
    for key in ("DIMS", "DEPTHS"):
        if not all(isinstance(v, int) and v > 0 for v in model[key]):
            raise ConfigError(f"MODEL.{key}: expected 4 whole numbers above 0, got {model[key]}")
    for order in model.ORDERS:
        if order not in ORDERS:
            raise ConfigError(f"MODEL.ORDERS: expected each of {', '.join(ORDERS)}, got {order!r}")
    _check_quadtree(model)
    if not 1 <= model.D_STATE <= 256:
        raise ConfigError(f"MODEL.D_STATE: expected 1 to 256, got {model.D_STATE}")
    for dim in model.DIMS:
        if dim % 2 or int(dim * model.SSM_RATIO) < 4:
            raise ConfigError(
                "MODEL.DIMS: expected even channels with at least 4 inner channels "
                f"(MODEL.SSM_RATIO {model.SSM_RATIO}), got {model.DIMS}"
            )


def _check_quadtree(model: CfgNode) -> None:
    sides = (2, 4, 8) if "quadtree" in model.ORDERS else (1, 2, 4, 8)
    if len(model.PARTITION) != 2 or not set(model.PARTITION) <= set(sides):
        raise ConfigError(
            f"MODEL.PARTITION: expected two of {', '.join(map(str, sides))} "
            f"(1 only where MODEL.ORDERS has no quadtree), got {model.PARTITION}"
        )
    if not 1 <= model.SHIFT_DIRECTIONS <= 4:
        raise ConfigError(f"MODEL.SHIFT_DIRECTIONS: expected 1 to 4, got {model.SHIFT_DIRECTIONS}")


def _check_step(cfg: CfgNode) -> None:
    train = cfg.TRAIN
    if cfg.RANK_TIMEOUT > _MAX_MINUTES:
        raise ConfigError(
            f"RANK_TIMEOUT: expected at most {_MAX_MINUTES} minutes, got {cfg.RANK_TIMEOUT}"
        )
    if train.EMA and not train.EMA_DECAY:
        raise ConfigError(
            "TRAIN.EMA_DECAY: expected above 0 with TRAIN.EMA, got 0 (TRAIN.EMA False keeps none)"
        )
    if train.COMPILE == "graph" and cfg.MODEL.USE_CHECKPOINT:
        raise ConfigError(
            "MODEL.USE_CHECKPOINT: expected False with TRAIN.COMPILE graph, got True; "
            "a recorded step cannot draw its random numbers again"
        )


def _check_recipe(cfg: CfgNode) -> None:
    train, aug = cfg.TRAIN, cfg.AUG
    if not 0 <= train.SEED < 2**63:
        raise ConfigError(f"TRAIN.SEED: expected 0 or more, below 2^63, got {train.SEED}")
    if len(train.BETAS) != 2 or not all(0 <= b < 1 for b in train.BETAS):
        raise ConfigError(f"TRAIN.BETAS: expected two numbers in [0, 1), got {train.BETAS}")
    if len(aug.SCALE) != 2 or not 0 < aug.SCALE[0] <= aug.SCALE[1] <= 1:
        raise ConfigError(f"AUG.SCALE: expected 0 < low <= high <= 1, got {aug.SCALE}")
    if cfg.DATA.CROP_RATIO == 0:
        raise ConfigError("DATA.CROP_RATIO: expected above 0 and at most 1, got 0")
    if train.RESUME and train.PRETRAINED:
        raise ConfigError(
            "TRAIN.RESUME and TRAIN.PRETRAINED: expected one of them, got both "
            "(resume continues a run, pretrained starts a new one from weights)"
        )


def _check_warmup(cfg: CfgNode, levels: Sequence[set[str]]) -> None:
    """A warm-up that does not fit is an error where it was set together with the epochs, or after.

    levels: the keys that were set, from the first source to the last. A warm-up from an earlier
    source than the epochs shrinks (`utils.optim.warmup_epochs`).
    """
    train = cfg.TRAIN
    warmup, epochs = (
        max((i for i, keys in enumerate(levels) if key in keys), default=-1)
        for key in ("TRAIN.WARMUP_EPOCHS", "TRAIN.EPOCHS")
    )
    if cfg.MODE == "train" and train.WARMUP_EPOCHS >= train.EPOCHS and warmup >= epochs:
        raise ConfigError(
            f"TRAIN.WARMUP_EPOCHS: expected fewer than TRAIN.EPOCHS = {train.EPOCHS}, "
            f"got {train.WARMUP_EPOCHS}"
        )


def _find(name: str) -> Path:
    """The file `name`, or else the packaged one of that name, with or without its ending."""
    path = Path(name)
    if os.path.isfile(path):
        return path
    name, names = path.name.removesuffix(".yaml"), packaged()
    if name in names and path.parent in (Path(), Path("configs")):
        return _PACKAGED / f"{name}.yaml"
    if os.path.exists(path):  # a pipe may be read, a folder may not
        if not path.is_dir():
            return path
        raise ConfigError(f"--cfg: expected a YAML file or a name, got the folder {path}")
    beside = {file.name: str(file) for file in path.parent.glob("*.yaml")}
    choices = {known: known for known in names} | beside
    near = difflib.get_close_matches(path.name, choices, 1)
    hint = f"; did you mean {choices[near[0]]}?" if near else ""
    raise ConfigError(f"--cfg: no such file: {path}{hint}\npackaged, by name: {', '.join(names)}")


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _merge(cfg: CfgNode, settings: Sequence[Setting]) -> set[str]:
    """Write `settings` into `cfg`; returns their keys. Raises ConfigError where two contradict."""
    known = list(_keys(cfg))
    given: dict[str, tuple[object, str]] = {}
    for setting in settings:
        key, where = setting.key, setting.where
        if key not in known:
            raise _unknown(key, where, known)
        *path, leaf = key.split(".")
        node = get_key(cfg, ".".join(path)) if path else cfg
        value = node[leaf] = convert(key, setting.value, get_key(_C, key), where)
        before, place = given.setdefault(key, (value, where))
        if before != value:
            raise ConfigError(
                f"{key}: expected one value, got {before!r} {place} and {value!r} {where}"
            )
    return set(given)


def _unknown(key: str, where: str, known: Sequence[str]) -> ConfigError:
    names = {*known, *sections_of(known)} - {key}
    near = difflib.get_close_matches(key.upper(), sorted(names), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"unknown key {key} {where}{hint}")
