"""Augmentation policies of timm: every strength gives an image, an unknown one an explanation."""

import pytest
from PIL import Image

from quadmamba.configs import load_cfg
from quadmamba.data import DataError, build_loaders, build_transforms


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9", "original", "v0"])
def test_posterize_at_both_ends_is_an_image(policy):
    transform = build_transforms(load_cfg(opts=["AUG.AUTO_AUGMENT", policy])).train
    steps = [s for s in transform.transforms if hasattr(s, "ops") or hasattr(s, "policy")]
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
