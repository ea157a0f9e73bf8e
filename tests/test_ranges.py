"""The ends of every range of a key: the last value that is taken and the first that is not."""

import pytest

from quadmamba.configs import ConfigError, load_cfg
from quadmamba.configs.load import get_key

ABOVE_0 = ["DATA.IMG_SIZE", "DATA.BATCH_SIZE", "TRAIN.EPOCHS", "TRAIN.ACCUM_STEPS", "MODEL.WINDOW"]
ABOVE_0 += [
    "TRAIN.SAVE_EVERY",
    "TRAIN.KEEP",
    "TRAIN.MAX_BAD_STEPS",
    "TRAIN.EVAL_EVERY",
    "MODEL.TAU",
]
ABOVE_0 += ["TRAIN.BASE_LR", "TRAIN.EPS", "RANK_TIMEOUT", "MODEL.SSM_RATIO", "LOG_EVERY"]
ABOVE_0 += ["LOG_IMAGES_EVERY", "DATA.TIMEOUT", "DATA.MAX_PIXELS"]
FROM_0 = ["MODEL.NUM_CLASSES", "MODEL.MLP_RATIO", "DATA.WORKERS", "AUG.MIXUP", "AUG.CUTMIX"]
FROM_0 += ["AUG.COLOR_JITTER", "TRAIN.WARMUP_EPOCHS", "TRAIN.LR_BATCH", "TRAIN.WARMUP_LR"]
FROM_0 += ["TRAIN.MIN_LR", "TRAIN.WEIGHT_DECAY", "TRAIN.CLIP_GRAD", "TRAIN.SAVE_MINUTES"]
FROM_0 += ["LOG_IMAGES"]
SHARES = ["MODEL.DROP_PATH", "DATA.CROP_RATIO", "AUG.HFLIP", "AUG.REPROB", "AUG.MIXUP_PROB"]
SHARES += ["AUG.MIXUP_SWITCH_PROB", "TRAIN.LABEL_SMOOTHING", "TRAIN.EMA_DECAY"]
TEXTS = {
    "MODEL.SELECTION": ["predictor", "random", "first"],
    "MODE": ["train", "eval", "throughput", "info"],
    "DEVICE": ["auto", "cpu", "cuda"],
    "DATA.ON_ERROR": ["raise", "skip"],
    "DATA.INTERPOLATION": ["bicubic", "bilinear"],
    "TRAIN.AMP": ["bf16", "fp16", "off"],
    "TRAIN.COMPILE": ["off", "graph", "default", "reduce-overhead", "max-autotune"],
    "AUG.REMODE": ["pixel", "rand", "const"],
}
MORE = {"TRAIN.EPOCHS": {"TRAIN.WARMUP_EPOCHS": 0}}  # what else a value needs
BOUNDS = [
    *((key, 0, 1, "expected a number above 0, got 0") for key in ABOVE_0),
    *((key, -1, 0, "expected 0 or more, got -1") for key in FROM_0),
    *((key, 1.01, 1, "expected a number from 0 to 1, got 1.01") for key in SHARES),
    *((key, -0.01, 0.01, "expected a number from 0 to 1, got -0.01") for key in SHARES),
    ("DATA.CROP_RATIO", 0.0, 0.001, "expected above 0 and at most 1, got 0"),
    ("TRAIN.EMA_DECAY", 0.0, 0.001, "expected above 0 with TRAIN.EMA, got 0"),
    ("MODEL.D_STATE", 0, 1, "expected 1 to 256, got 0"),
    ("MODEL.D_STATE", 257, 256, "expected 1 to 256, got 257"),
    ("MODEL.SHIFT_DIRECTIONS", 0, 1, "expected 1 to 4, got 0"),
    ("MODEL.SHIFT_DIRECTIONS", 5, 4, "expected 1 to 4, got 5"),
    ("MODEL.PARTITION", [2, 1], [2, 8], "expected two of 2, 4, 8 "),
    ("MODEL.PARTITION", [3, 4], [8, 2], "expected two of 2, 4, 8 "),
    ("MODEL.PARTITION", [2, 4, 8], [4, 4], "expected two of 2, 4, 8 "),
    ("MODEL.DIMS", [8, 8, 8, 9], [8, 8, 8, 10], "expected even channels with at least 4 inner"),
    ("MODEL.DIMS", [8, 8, 0, 8], [8, 8, 2, 8], "expected 4 whole numbers above 0"),
    ("MODEL.DIMS", [8, 8, 8], [8, 8, 8, 8], "expected one value for each of 4 stages"),
    ("MODEL.DEPTHS", [1, 1, 1, 0], [1, 1, 1, 1], "expected 4 whole numbers above 0"),
    ("MODEL.ORDERS", ["raster"] * 5, ["raster"] * 4, "expected one value for each of 4 stages"),
    ("MODEL.ORDERS", ["Raster"] * 4, ["window"] * 4, "expected each of quadtree, release, raster"),
    ("TRAIN.BETAS", [1.0, 0.9], [0.999, 0.0], "expected two numbers in [0, 1)"),
    ("TRAIN.BETAS", [0.9, -0.1], [0.0, 0.0], "expected two numbers in [0, 1)"),
    ("TRAIN.BETAS", [0.9], [0.9, 0.9], "expected two numbers in [0, 1)"),
    ("AUG.SCALE", [0.0, 1.0], [0.01, 1.0], "expected 0 < low <= high <= 1"),
    ("AUG.SCALE", [0.6, 0.5], [0.5, 0.5], "expected 0 < low <= high <= 1"),
    ("AUG.SCALE", [0.5, 1.1], [0.5, 1.0], "expected 0 < low <= high <= 1"),
    ("AUG.SCALE", [0.1, 0.2, 0.3], [0.1, 0.2], "expected 0 < low <= high <= 1"),
    ("TRAIN.SEED", -1, 2**63 - 1, "expected 0 or more"),
    ("RANK_TIMEOUT", 1_000_001.0, 1e6, "expected at most 1000000 minutes, got 1000001"),
    ("TRAIN.WARMUP_EPOCHS", 300, 299, "expected fewer than TRAIN.EPOCHS = 300, got 300"),
]


@pytest.mark.parametrize(
    ("key", "bad", "good", "message"), BOUNDS, ids=[f"{case[0]}-{case[1]}" for case in BOUNDS]
)
def test_a_range_ends_where_it_says(key, bad, good, message):
    flags = dict(MORE.get(key, {}))
    assert get_key(load_cfg(flags=flags | {key: good}), key) == good
    with pytest.raises(ConfigError) as caught:
        load_cfg(flags=flags | {key: bad})
    assert str(caught.value).startswith(f"{key}: {message}")


@pytest.mark.parametrize("key", TEXTS)
def test_each_choice_is_taken_and_no_other(key):
    for choice in TEXTS[key]:
        assert get_key(load_cfg(flags={key: choice}), key) == choice
    with pytest.raises(ConfigError) as caught:
        load_cfg(flags={key: "other"})
    assert str(caught.value) == f"{key}: expected one of {', '.join(TEXTS[key])}, got 'other'"


def test_zero_is_a_share_where_it_means_none():
    zeros = [key for key in SHARES if key not in ("DATA.CROP_RATIO", "TRAIN.EMA_DECAY")]
    cfg = load_cfg(flags=dict.fromkeys(zeros, 0.0))
    assert [get_key(cfg, key) for key in zeros] == [0.0] * len(zeros)
    without = load_cfg(flags={"TRAIN.EMA": False, "TRAIN.EMA_DECAY": 0.0})
    assert without.TRAIN.EMA_DECAY == 0


RELATED = [
    ({"TRAIN.COMPILE": "graph", "MODEL.USE_CHECKPOINT": True}, "MODEL.USE_CHECKPOINT: expected"),
    ({"TRAIN.RESUME": "a", "TRAIN.PRETRAINED": "b"}, "TRAIN.RESUME and TRAIN.PRETRAINED: expected"),
    ({"MODEL.DIMS": [2, 8, 8, 8], "MODEL.SSM_RATIO": 1.5}, "MODEL.DIMS: expected even channels"),
    ({"MODEL.DIMS": [4, 8, 8, 8], "MODEL.SSM_RATIO": 0.9}, "MODEL.DIMS: expected even channels"),
]


@pytest.mark.parametrize(("flags", "message"), RELATED)
def test_values_that_do_not_go_together(flags, message):
    with pytest.raises(ConfigError) as caught:
        load_cfg(flags=flags)
    assert str(caught.value).startswith(message)
    for key in flags:
        load_cfg(flags={other: value for other, value in flags.items() if other != key})


def test_one_window_on_a_side_is_for_grids_without_a_quadtree():
    orders = ["release", "raster", "window", "release"]
    for partition in ([1, 8], [1, 1], [2, 1]):
        cfg = load_cfg(flags={"MODEL.PARTITION": partition, "MODEL.ORDERS": orders})
        assert partition == cfg.MODEL.PARTITION
    with pytest.raises(ConfigError, match="expected two of 1, 2, 4, 8"):
        load_cfg(flags={"MODEL.PARTITION": [1, 3], "MODEL.ORDERS": orders})


def test_a_warm_up_as_long_as_the_run_stops_training_alone():
    flags = {"TRAIN.WARMUP_EPOCHS": 300}
    assert load_cfg(flags=flags | {"MODE": "eval"}).TRAIN.WARMUP_EPOCHS == 300
