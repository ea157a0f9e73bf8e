"""Augmentation policies of timm: what is replaced does the same, what is broken is mended."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_ops

from quadmamba.configs import load_cfg
from quadmamba.data import DataError, build_loaders, build_transforms, seeded
from quadmamba.data.augment import sharpness


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9", "original", "v0"])
def test_posterize_at_both_ends_is_an_image(policy):
    transform = build_transforms(load_cfg(opts=["AUG.AUTO_AUGMENT", policy])).train
    steps = [s for s in transform.colours.transforms if hasattr(s, "ops") or hasattr(s, "policy")]
    ops = [op for s in steps for op in getattr(s, "ops", sum(getattr(s, "policy", []), []))]
    posterize = [op for op in ops if op.name.startswith("Posterize")]
    assert posterize
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for op in posterize:
        op.prob, op.magnitude_std = 1.0, 0
        for op.magnitude in (0, 10):
            assert op(image).size == (8, 8)


def test_an_unknown_policy_is_explained(tmp_path):
    (tmp_path / "val/a").mkdir(parents=True)
    cfg = load_cfg(flags={"DATA.PATH": str(tmp_path), "AUG.AUTO_AUGMENT": "foo"})
    with pytest.raises(DataError, match=r"AUG.AUTO_AUGMENT: expected a policy .* got 'foo'"):
        build_loaders(cfg)


def photo(height, width):
    """Smooth areas, edges and noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    pixels = noise + np.stack([x % 97, (x // 8 + y // 8) % 2 * 150, y * 195 // height], -1)
    return Image.fromarray(pixels.astype(np.uint8))


OPERATIONS = {
    "ShearX": timm_ops.shear_x,
    "ShearY": timm_ops.shear_y,
    "TranslateXRel": timm_ops.translate_x_rel,
    "TranslateYRel": timm_ops.translate_y_rel,
}


def operation(name, **flags):
    flags = {"AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1"} | flags
    (policy,) = build_transforms(load_cfg(flags=flags)).train.colours.transforms
    return next(op for op in policy.ops if op.name == name)


# Bilinear sums that are whole numbers in exact arithmetic are cut off on either side of them
@pytest.mark.parametrize(("resampling", "differ"), [("bicubic", 0.005), ("bilinear", 0.1)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_lines_slide_as_in_pillow(name, resampling, differ):
    image = photo(60, 80)
    op = operation(name, **{"DATA.INTERPOLATION": resampling})
    for amount in (-0.45, -0.3, -0.01, 0.0, 0.123, 0.3):
        got = np.asarray(op.aug_fn(image, amount, **op.kwargs)).astype(int)
        expected = np.asarray(OPERATIONS[name](image, amount, **op.kwargs)).astype(int)
        assert abs(got - expected).max() <= 1, amount
        assert (got != expected).mean() < differ, amount


@pytest.mark.parametrize("size", [(60, 80), (3, 3), (2, 9)])
def test_sharpness_is_that_of_pillow(size):
    image = photo(*size)
    for factor in (0.1, 0.77, 1.0, 1.9):
        got, expected = sharpness(image, factor), timm_ops.sharpness(image, factor)
        assert np.array_equal(np.asarray(got), np.asarray(expected)), factor


def test_the_policy_runs_the_replacements(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("Pillow's own, slow operation")

    image, ops = photo(32, 32), [operation(name) for name in (*OPERATIONS, "SharpnessIncreasing")]
    monkeypatch.setattr(Image.Image, "transform", fail)
    monkeypatch.setattr(Image.Image, "filter", fail)
    for op in ops:
        op.prob = 1.0
        with seeded(0):
            assert np.asarray(op(image)).shape == (32, 32, 3)


def policy_of(auto_augment, **keys):
    flags = {"AUG.AUTO_AUGMENT": auto_augment} | keys
    return build_transforms(load_cfg(flags=flags)).train.colours.transforms


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_the_policy_is_that_of_timm_by_number(name):
    (ours,) = policy_of("rand-m7-n3-mstd0.7-inc1", **{"DATA.INTERPOLATION": name})
    timms = timm_ops.rand_augment_transform(
        "rand-m7-n3-mstd0.7-inc1",
        {
            "translate_const": int(224 * 0.45),
            "img_mean": (124, 116, 104),
            "interpolation": Image.Resampling[name.upper()],
        },
    )
    assert (ours.num_layers, ours.choice_weights) == (3, None)
    assert len(ours.ops) == len(timms.ops) == 15
    for mine, theirs in zip(ours.ops, timms.ops):
        for key in ("name", "prob", "magnitude", "hparams", "magnitude_std", "magnitude_max"):
            assert getattr(mine, key) == getattr(theirs, key), (mine.name, key)
        assert mine.kwargs == theirs.kwargs
        if not mine.name.startswith("Posterize"):
            assert mine.level_fn is theirs.level_fn
        if mine.name not in (*OPERATIONS, "SharpnessIncreasing"):
            assert mine.aug_fn is theirs.aug_fn


def test_posterize_keeps_what_timm_keeps_but_at_least_a_bit():
    (ours,) = policy_of("rand-m9-inc1")
    (theirs,) = (
        op for op in timm_ops.rand_augment_transform("rand-m9-inc1", {}).ops if "Post" in op.name
    )
    (mine,) = (op for op in ours.ops if "Post" in op.name)
    bits = {level: theirs.level_fn(level, {})[0] for level in range(11)}
    assert {level: mine.level_fn(level, {})[0] for level in range(11)} == {
        level: max(1, kept) for level, kept in bits.items()
    }
    assert 0 in bits.values()


def test_jitter_takes_the_place_of_no_policy():
    (jitter,) = policy_of("", **{"AUG.COLOR_JITTER": 0.3})
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3)
    assert jitter.hue is None
    assert policy_of("", **{"AUG.COLOR_JITTER": 0.0}) == []
    assert len(policy_of("rand-m9", **{"AUG.COLOR_JITTER": 0.3})) == 1
