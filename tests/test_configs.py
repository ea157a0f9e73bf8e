"""Configuration: precedence, every YAML, and errors that name the key."""

from pathlib import Path

import pytest

from quadmamba.configs import ConfigError, load_cfg
from quadmamba.configs.defaults import _C
from quadmamba.configs.load import get_key

ROOT = Path(__file__).parent.parent
YAMLS = sorted((ROOT / "configs").glob("*.yaml"))
LINES = (ROOT / "configs/defaults.py").read_text().splitlines()


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_yaml_loads_and_is_short(path):
    text = path.read_text()
    assert load_cfg(path).MODEL.NAME.endswith(path.stem)
    assert text.startswith("# Expected: ")
    assert len(text.splitlines()) <= 18


def test_every_key_has_a_comment():
    keys = [i for i, line in enumerate(LINES) if line.startswith("_C.") and "CfgNode()" not in line]
    assert len(keys) > 50
    for i in keys:
        assert LINES[i - 1].startswith("# "), LINES[i]


def test_precedence_is_defaults_then_yaml_then_the_command_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "DATA: {BATCH_SIZE: 2, IMG_SIZE: 64}\nTRAIN:\n  BASE_LR: 5e-4\n  WARMUP_LR: 1e-6\n"
    )
    flags = {"DATA.IMG_SIZE": 96, "DATA.WORKERS": 0}
    opts = ["TRAIN.WARMUP_LR", "2e-6", "TRAIN.MIN_LR", "1e-6", "TAG", "x"]
    cfg = load_cfg(path, flags, opts)
    values = cfg.DATA.BATCH_SIZE, cfg.DATA.IMG_SIZE, cfg.DATA.WORKERS, cfg.DATA.PIN_MEMORY
    assert values == (2, 96, 0, True)
    rates = cfg.TRAIN.BASE_LR, cfg.TRAIN.WARMUP_LR, cfg.TRAIN.MIN_LR
    assert (*rates, cfg.TAG) == (5e-4, 2e-6, 1e-6, "x")
    assert cfg.is_frozen()
    assert load_cfg(opts=["MODEL.SSM_RATIO", "1"]).MODEL.SSM_RATIO == 1.0
    assert _C.DATA.BATCH_SIZE == 128


BAD = [
    (
        ["DATA.BATHC_SIZE", "1"],
        "unknown key DATA.BATHC_SIZE in --opts; did you mean DATA.BATCH_SIZE?",
    ),
    (["TRAIN", "1"], "unknown key TRAIN in --opts"),
    (["DATA.BATCH_SIZE", "big"], "DATA.BATCH_SIZE: expected int in --opts, got 'big'"),
    (["DATA.BATCH_SIZE", "1.5"], "DATA.BATCH_SIZE: expected int"),
    (["DATA.PIN_MEMORY", "1"], "DATA.PIN_MEMORY: expected bool"),
    (["MODEL.DIMS", "[8, 8.5, 8, 8]"], r"MODEL.DIMS\[1\]: expected int"),
    (["TRAIN.BASE_LR", "fast"], "TRAIN.BASE_LR: expected float"),
    (["TRAIN.EPOCHS", "[1"], "--opts TRAIN.EPOCHS: expected a YAML value"),
    (["TRAIN.EPOCHS"], "expected KEY VALUE pairs, got 1 words"),
    (["TRAIN.EPOCHS", "0"], "TRAIN.EPOCHS: expected a number above 0, got 0"),
    (["DATA.WORKERS", "-1"], "DATA.WORKERS: expected 0 or more"),
    (["MODEL.DROP_PATH", "1.2"], "MODEL.DROP_PATH: expected a number from 0 to 1"),
    (["DEVICE", "tpu"], "DEVICE: expected one of auto, cpu, cuda, got 'tpu'"),
    (["MODEL.ORDERS", "[a, b, c, d]"], "MODEL.ORDERS: expected each of quadtree"),
    (["MODEL.DEPTHS", "[1, 1]"], "MODEL.DEPTHS: expected one value for each of 4 stages"),
    (["MODEL.DEPTHS", "[1, 1, 0, 1]"], "MODEL.DEPTHS: expected 4 whole numbers above 0"),
    (["MODEL.PARTITION", "[2]"], "MODEL.PARTITION: expected two of 2, 4, 8"),
    (["MODEL.PARTITION", "[1, 2]"], r"\(1 only where MODEL.ORDERS has no quadtree\), got \[1, 2\]"),
    (["MODEL.SELECTION", "best"], "MODEL.SELECTION: expected one of predictor, random, first"),
    (["MODEL.SHIFT_DIRECTIONS", "5"], "MODEL.SHIFT_DIRECTIONS: expected 1 to 4, got 5"),
    (["MODEL.D_STATE", "0"], "MODEL.D_STATE: expected 1 to 256"),
    (["MODEL.DIMS", "[2, 2, 2, 2]", "MODEL.SSM_RATIO", "1"], "MODEL.DIMS: expected even channels"),
    (["TRAIN.WARMUP_EPOCHS", "300"], "TRAIN.WARMUP_EPOCHS: expected fewer than TRAIN.EPOCHS = 300"),
    (["TRAIN.BETAS", "[0.9, 1.0]"], "TRAIN.BETAS: expected two numbers"),
    (["AUG.SCALE", "[0.9, 0.1]"], "AUG.SCALE: expected 0 < low <= high"),
    (["DATA.CROP_RATIO", "0"], "DATA.CROP_RATIO: expected above 0"),
    (["TRAIN.SEED", "-1"], "TRAIN.SEED: expected 0 or more"),
    (["TRAIN.CLIP_GRAD", ".nan"], "TRAIN.CLIP_GRAD: expected a finite number"),
    (["TRAIN.RESUME", "a", "TRAIN.PRETRAINED", "b"], "TRAIN.RESUME and TRAIN.PRETRAINED"),
    (["TRAIN.EMA_DECAY", "0"], "TRAIN.EMA_DECAY: expected above 0 with TRAIN.EMA"),
    (
        ["MODEL.USE_CHECKPOINT", "True", "TRAIN.COMPILE", "graph"],
        "MODEL.USE_CHECKPOINT: expected False with TRAIN.COMPILE graph",
    ),
]


@pytest.mark.parametrize(
    ("opts", "message"), BAD, ids=lambda v: v[0] if isinstance(v, list) else ""
)
def test_a_bad_value_is_an_error_that_names_its_key(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_cfg(opts=opts)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: .*; did you mean .*quadmamba_small.yaml"):
        load_cfg(ROOT / "configs/quadmamba_smal.yaml")
    for text, message in (("a: [", "not a YAML file"), ("hello", "expected KEY: value lines")):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_cfg(path)
    path.write_text("MODEL: {DIM: [1]}")
    with pytest.raises(ConfigError, match=r"unknown key MODEL.DIM in .*; did you mean MODEL.DIMS"):
        load_cfg(path)


NAMES = (*("quadmamba_lite", "quadmamba_lite.yaml"), Path("configs/quadmamba_lite.yaml"))


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_M8_a_packaged_configuration_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quadmamba_lite").mkdir()  # a folder, as a run of this name makes
    cfg = load_cfg(name)
    assert (cfg.MODEL.NAME, cfg.MODEL.DIMS) == ("quadmamba_lite", [48, 96, 192, 384])


def test_M8_a_file_at_the_given_path_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "configs").mkdir()
    for name in ("digits", "configs/digits.yaml"):
        (tmp_path / name).write_text("TAG: mine")
    for path in ("digits", "configs/digits.yaml", "~/digits"):
        assert load_cfg(path).TAG == "mine", path
    assert load_cfg("digits.yaml").TAG == "default"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("quadmamba_smal", r"no such file: quadmamba_smal; did you mean quadmamba_small\?"),
        (
            "../configs/digits.yaml",
            r"no such file: .*; did you mean digits\?\npackaged, by name:",
        ),
        ("", "expected a YAML file or a name, got the folder ."),
        ("x" * 300, "expected a path of at most .* got .xxx"),
    ],
)
def test_M8_what_is_not_found_is_said_with_the_names(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_cfg(path)


def test_get_key_reads_a_dotted_key():
    assert get_key(load_cfg(), "TRAIN.EPOCHS") == 300
