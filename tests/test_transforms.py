"""From an image to the bytes of a view, beside Pillow and timm."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import finish, start
from timm.data import create_transform

from quadmamba.configs import load_cfg
from quadmamba.data import DataError, build_transforms, read_image, seeded
from quadmamba.data.datasets import Sample, collate
from quadmamba.data.prefetch import Prefetcher
from quadmamba.data.transforms import resize, to_bytes

MAX_PIXELS = 10**6
AUGMENTATIONS = {
    "crop": ("AUG.SCALE", [0.5, 0.6]),
    "flip": ("AUG.HFLIP", 0.5),
    "jitter": ("AUG.COLOR_JITTER", 0.4),
    "policy": ("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"),
    "erasing": ("AUG.REPROB", 1.0),
}
NO_AUGMENTATION = {
    "AUG.SCALE": [1.0, 1.0],
    "AUG.HFLIP": 0.0,
    "AUG.COLOR_JITTER": 0.0,
    "AUG.AUTO_AUGMENT": "",
    "AUG.REPROB": 0.0,
}


def noise(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def photo(height, width):
    """Noise of a photograph's kind: strong over many pixels, weak over few."""
    small = noise(height // 12, width // 12).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(small, noise(height, width), 0.1)


def differences(got, expected):
    return np.abs(np.asarray(got).astype(int) - np.asarray(expected).astype(int))


def train_transform(**flags):
    return build_transforms(load_cfg(flags=NO_AUGMENTATION | {"DATA.IMG_SIZE": 32} | flags)).train


def finished(transform, image, mode="pixel", views=4):
    """What training sees of an image, by the same few seeds."""
    samples = []
    for i in range(views):
        with seeded(i):
            view = transform(to_bytes(image))
        samples.append(Sample(view.image, 0, view.hole))
    ((images, _),) = Prefetcher(torch.device("cpu"), mode)([collate(samples)])
    return images


# (height, width) of the crop -> of the view: both sides shrink, both grow, one of each, one alone
SIZES = [
    ((90, 120), (32, 32)),
    ((20, 25), (32, 32)),
    ((90, 20), (32, 32)),
    ((20, 90), (32, 32)),
    ((90, 32), (32, 32)),
    ((32, 90), (32, 32)),
    ((32, 32), (32, 32)),
    ((1, 7), (16, 48)),
]


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resizing_is_that_of_pillow(source, target, name):
    frame = noise(100, 130)
    top, left = 4, 6
    image = to_bytes(frame)[top : top + source[0], left : left + source[1]]
    cropped = frame.crop((left, top, left + source[1], top + source[0]))
    expected = cropped.resize(target[::-1], Image.Resampling[name.upper()])
    got = resize(image, target, name)
    assert got.is_contiguous()
    assert differences(got, expected).max() <= 1
    assert (differences(got, expected) > 0).mean() < 0.02


@pytest.mark.parametrize("side", [32, 96, 160, 224, 256, 320, 384])
@pytest.mark.parametrize("size", [(256, 343), (343, 256), (301, 400), (256, 256), (50, 301)])
def test_validation_resizes_and_crops_as_timm(size, side):
    """Sides whose resized length, or whose margin, is no whole number are rounded alike."""
    image = noise(*size)
    got = build_transforms(load_cfg(flags={"DATA.IMG_SIZE": side})).val(to_bytes(image))
    timms = create_transform(side, crop_pct=0.875, interpolation="bicubic", use_prefetcher=True)
    assert got.hole is None
    assert got.image.shape == (side, side, 3)
    assert differences(got.image.permute(2, 0, 1), timms(image)).max() <= 2


@pytest.mark.parametrize(("ratio", "name"), [(0.9, "bilinear"), (1.0, "bicubic"), (0.3, "bicubic")])
def test_the_ratio_and_the_resampling_of_validation_have_their_keys(ratio, name):
    image = noise(90, 121)
    keys = {"DATA.IMG_SIZE": 48, "DATA.CROP_RATIO": ratio, "DATA.INTERPOLATION": name}
    got = build_transforms(load_cfg(flags=keys)).val(to_bytes(image)).image
    timms = create_transform(48, crop_pct=ratio, interpolation=name, use_prefetcher=True)
    assert differences(got.permute(2, 0, 1), timms(image)).max() <= 2


@pytest.mark.parametrize("part", ["train", "val"])
def test_small_images_are_enlarged(part):
    image = to_bytes(Image.new("RGB", (8, 8), "gray"))
    transform = getattr(build_transforms(load_cfg(flags={"DATA.IMG_SIZE": 32})), part)
    assert transform(image).image.shape == (32, 32, 3)


TINY = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 3),
    (3, 1),
    (2, 2),
    (3, 2),
    (1, 5),
    (4, 3),
    (1, 20000),
    (20000, 1),
]


@pytest.mark.parametrize("size", TINY)
def test_C3_any_image_of_one_pixel_and_more_works(size):
    image = to_bytes(noise(*size))
    transforms = build_transforms(load_cfg(flags={"DATA.IMG_SIZE": 16, "AUG.SCALE": [0.01, 1.0]}))
    for seed in range(60):
        with seeded(seed):
            view = transforms.train(image).image
        assert view.shape == (16, 16, 3)
    assert transforms.val(image).image.shape == (16, 16, 3)


def test_C3_the_crop_of_a_tiny_image_is_one_of_its_pixels():
    image = to_bytes(noise(3, 2))
    colours = {tuple(colour) for colour in image.view(-1, 3).tolist()}
    transform, seen = train_transform(**{"AUG.SCALE": [0.01, 0.02]}), set()
    for seed in range(100):
        with seeded(seed):
            view = transform(image).image
        assert (view == view[0, 0]).all()
        seen.add(tuple(view[0, 0].tolist()))
    assert seen == colours


# Strips, the longest by their shorter sides: resized as a whole by Pillow they still fit
STRIPS = [(40, 3000), (3000, 40), (30, 481), (300, 9000), (1, 300), (300, 1), (700, 12000)]


def centre_by_pillow(image, short, size, resample):
    """The whole resized by Pillow, its shorter side to `short`, then the crop."""
    w, h = image.size
    long = int(short * max(w, h) / min(w, h))
    w, h = (long, short) if w > h else (short, long)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.resize((w, h), resample).crop((left, top, left + size, top + size))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", STRIPS)
def test_C4_the_centre_of_a_strip_is_that_of_pillow(size, interpolation):
    image = noise(*(max(1, side // 3) for side in size)).resize(size[::-1])
    keys = {"DATA.IMG_SIZE": 56, "DATA.INTERPOLATION": interpolation}
    got = build_transforms(load_cfg(flags=keys)).val(to_bytes(image)).image
    expected = centre_by_pillow(image, 64, 56, Image.Resampling[interpolation.upper()])
    assert differences(got, expected).max() <= 1
    assert (differences(got, expected) > 0).mean() < 1e-3


@pytest.mark.parametrize("ratio", [15, 16, 17, 18])
def test_C4_both_ways_agree_where_they_meet(ratio):
    image = photo(48, 48 * ratio)
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        got = build_transforms(load_cfg()).val(to_bytes(turned)).image
        expected = centre_by_pillow(turned, 256, 224, Image.Resampling.BICUBIC)
        assert differences(got, expected).max() <= 1


STRIP = """
import resource, sys, torch
from quadmamba.configs import load_cfg
from quadmamba.data import build_transforms, seeded
transforms = build_transforms(load_cfg())
for size in ((1, 60_000), (60_000, 1), (2, 30_000_000), (60_000_000, 1)):
    image = torch.zeros(*size, 3, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert transforms.val(image).image.shape == (224, 224, 3)
    with seeded(0):
        assert transforms.train(image).image.shape == (224, 224, 3)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_C4_memory_is_bounded_by_the_output():
    code, out, err = finish(start(["-c", STRIP]), timeout=60)
    assert code == 0, err
    grown = [int(line) * 1024 for line in out.splitlines()]
    assert max(grown) < 100e6, "of 11.8 GB for the whole of the first strip"


def test_training_augments_as_timm():
    """The same seed gives the same crop and operations; thresholds spread what a bit differs in."""
    image, cfg = photo(375, 500), load_cfg(flags={"AUG.HFLIP": 0.0, "AUG.REPROB": 0.0})
    ours = build_transforms(cfg).train
    timms = create_transform(
        224,
        is_training=True,
        use_prefetcher=True,
        scale=tuple(cfg.AUG.SCALE),
        hflip=0.0,
        auto_augment=cfg.AUG.AUTO_AUGMENT,
        interpolation=cfg.DATA.INTERPOLATION,
    )
    for op in timms.transforms[1].ops:
        if op.name.startswith("Posterize"):
            op.prob = 0.0  # asks for 0 bits, which Pillow refuses
    for op in ours.colours.transforms[0].ops:
        if op.name.startswith("Posterize"):
            op.prob = 0.0
    errors = []
    for seed in range(24):
        with seeded(seed):
            got = ours(to_bytes(image)).image
        with seeded(seed):
            expected = timms(image)
        errors.append(differences(got.permute(2, 0, 1), expected).mean())
    assert np.median(errors) < 0.05
    assert max(errors) < 1.0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_has_its_key(name):
    # 64x60: an area fraction of 1 fits no other aspect ratio than the image's own
    image = noise(64, 60)
    key, value = AUGMENTATIONS[name]
    fixed = finished(train_transform(), image)
    varied = finished(train_transform(**{key: value}), image)
    assert (fixed == fixed[0]).all(), "without augmentation every view is the same"
    assert (varied != fixed).any(), f"{key} changes nothing"


def test_half_of_the_views_are_flipped():
    image = noise(32, 32)
    fixed = finished(train_transform(), image)[0]
    views = finished(train_transform(**{"AUG.HFLIP": 0.5}), image, views=40)
    flipped = [torch.equal(view, fixed.flip(-1)) for view in views]
    assert 8 <= sum(flipped) <= 32
    assert all(turned or torch.equal(view, fixed) for turned, view in zip(flipped, views))


def test_the_hole_of_a_view_is_drawn_in_its_size():
    image, holes = Image.new("RGB", (90, 70)), []
    for probability in (0.0, 1.0):
        transform = train_transform(**{"AUG.REPROB": probability})
        with seeded(0):
            holes.append([transform(to_bytes(image)).hole for _ in range(40)])
    assert holes[0] == [None] * 40
    ends = [max(h.top + h.height for h in holes[1]), max(h.left + h.width for h in holes[1])]
    assert all(28 <= end <= 32 for end in ends)


# --------------------------------------------------------------------------------- image files
FILES = {
    "colour.jpg": ("RGB", {}),
    "full.jpg": ("RGB", {"subsampling": 0}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "grey.jpg": ("L", {}),
    "print.jpg": ("CMYK", {}),
    "colour.png": ("RGB", {}),
    "see-through.png": ("RGBA", {}),
    "palette.png": ("P", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_pillow_reads_them(tmp_path, name):
    mode, options = FILES[name]
    photo(96, 120).convert(mode).save(tmp_path / name, **options)
    got = read_image(tmp_path / name, MAX_PIXELS)
    assert (got.dtype, got.shape, got.is_contiguous()) == (torch.uint8, (96, 120, 3), True)
    assert np.array_equal(got, np.asarray(Image.open(tmp_path / name).convert("RGB")))


@pytest.mark.parametrize("kept", [0, 2, 3, 400, -2])
def test_a_jpeg_cut_short_is_named(tmp_path, kept):
    path = tmp_path / "a.jpg"
    photo(96, 120).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.jpg: \w+"):
        read_image(path, MAX_PIXELS)
