"""Data: seeding, sharing over ranks, and every kind of bad folder."""

import random
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from runs import finish, start, write_images

from quadmamba.configs import load_cfg
from quadmamba.data import DataError, build_loaders, seeded, skipped_images

CLASSES = ("ant", "bee", "cat")


def make_cfg(path, **flags):
    values = {"DATA.PATH": str(path), "DATA.IMG_SIZE": 16, "DATA.WORKERS": 0, "DATA.BATCH_SIZE": 4}
    return load_cfg(flags=values | {key.replace("__", "."): value for key, value in flags.items()})


@pytest.fixture
def root(tmp_path):
    """13 training and 7 validation images in three classes."""
    rng = np.random.default_rng(0)
    for part, counts in (("train", (5, 4, 4)), ("val", (3, 2, 2))):
        for name, count in zip(CLASSES, counts):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def spoil(path):
    path.write_bytes(path.read_bytes()[:90])


def rng_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# ------------------------------------------------------------------------------------- seeding
def test_seeded_repeats_and_restores():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = rng_states()
    with seeded(1, 2, 3):
        first = draw()
    assert rng_states() == before
    with seeded(1, 2, 3):
        assert draw() == first
    with seeded(1, 3, 2):
        assert all(a != b for a, b in zip(draw(), first))


def test_seeded_restores_after_an_error():
    before = rng_states()
    with pytest.raises(RuntimeError), seeded(0):  # noqa: PT012 - the draw belongs to the case
        random.random()
        raise RuntimeError
    assert rng_states() == before


def test_loading_leaves_the_global_generators_alone(root):
    loaders = build_loaders(make_cfg(root))
    before = rng_states()
    assert len(list(loaders.train)) == 3
    assert len(list(loaders.val)) == 2
    assert rng_states() == before


def test_samples_depend_on_seed_epoch_and_index_only(root):
    def epoch(number, **flags):
        loader = build_loaders(make_cfg(root, **flags)).train
        loader.sampler.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    first = epoch(0)
    assert torch.equal(epoch(0), first)
    assert torch.equal(epoch(0, DATA__WORKERS=2), first)
    assert not torch.equal(epoch(1), first)
    assert not torch.equal(epoch(0, TRAIN__SEED=1), first)
    shutil.copy(root / "train" / "ant" / "3.png", root / "train" / "ant" / "4.png")
    dataset = build_loaders(make_cfg(root)).train.dataset
    view = dataset[0, 3].image
    assert torch.equal(dataset[0, 3].image, view)
    assert not torch.equal(dataset[1, 3].image, view)
    assert not torch.equal(dataset[0, 4].image, view), "the same file under another index"


def test_an_image_does_not_depend_on_its_batch(root):
    def epoch(size):
        loader = build_loaders(make_cfg(root, DATA__BATCH_SIZE=size, AUG__REPROB=1.0)).train
        images = torch.cat([images for images, _ in loader])[:12]
        return dict(zip(list(loader.sampler), images))

    small, large = epoch(4), epoch(6)
    assert len(small) == 12
    assert all(torch.equal(small[draw], large[draw]) for draw in small)


def test_workers_see_the_epoch(root):
    loader = build_loaders(make_cfg(root, DATA__WORKERS=1)).train
    epochs = []
    for number in (0, 1, 0):
        loader.sampler.set_epoch(number)
        epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


# ----------------------------------------------------------------------------------- all ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_validation_covers_each_image_once(root, world_size):
    parts = []
    for rank in range(world_size):
        loader = build_loaders(
            make_cfg(root, DATA__BATCH_SIZE=2), rank=rank, world_size=world_size, with_train=False
        ).val
        batches = list(loader)
        assert len(batches) == len(loader)
        parts += [images for images, _ in batches]
    images = torch.cat(parts)
    assert len(images) == 7
    assert len(torch.unique(images.flatten(1), dim=0)) == 7


def test_ranks_share_an_epoch(root):
    draws = []
    for rank in range(2):
        train = build_loaders(make_cfg(root), rank=rank, world_size=2).train
        train.sampler.set_epoch(5)
        assert [len(images) for images, _ in train] == [4], "6 images a rank make one batch of 4"
        draws += list(train.sampler)
    assert {epoch for epoch, _ in draws} == {5}
    assert len({index for _, index in draws}) == 12


def test_targets_are_class_numbers(root):
    loaders = build_loaders(make_cfg(root), with_train=False)
    assert loaders.classes == list(CLASSES)
    assert loaders.train is None
    targets = torch.cat([targets for _, targets in loaders.val])
    assert targets.dtype == torch.int64
    assert targets.tolist() == [0, 0, 0, 1, 1, 2, 2]


# --------------------------------------------------------------------------------------- mixup
def test_mixup_is_off_without_alphas(root):
    assert build_loaders(make_cfg(root, AUG__MIXUP=0.0, AUG__CUTMIX=0.0)).mixup is None


def test_mixup_smooths_and_repeats(root):
    loaders = build_loaders(make_cfg(root, AUG__CUTMIX=0.0, TRAIN__LABEL_SMOOTHING=0.3))
    images, targets = next(iter(loaders.train))
    with seeded(0, 1):
        mixed, soft = loaders.mixup(images.clone(), targets)
    assert soft.shape == (4, 3)
    torch.testing.assert_close(soft.sum(-1), torch.ones(4))
    assert soft.min() >= 0.1 - 1e-6
    assert not torch.equal(mixed, images)
    with seeded(0, 1):
        assert torch.equal(loaders.mixup(images.clone(), targets)[0], mixed)


# ------------------------------------------------------------------------------ unreadable files
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unreadable_image_is_named(root, part, workers):
    bad = root / part / "bee" / "1.png"
    spoil(bad)
    cfg = make_cfg(root, DATA__WORKERS=workers, DATA__BATCH_SIZE=1, AUG__MIXUP=0.0, AUG__CUTMIX=0.0)
    loader = getattr(build_loaders(cfg), part)
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert str(bad) in message
    assert "DATA.ON_ERROR" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) < 5


@pytest.mark.parametrize("content", [b"", b"no image at all", b"GIF89a", b"\x89PNG\r\n\x1a\n\x00"])
def test_contents_that_are_no_image(root, content):
    (root / "val" / "cat" / "0.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cat/0\.png"):
        list(build_loaders(make_cfg(root), with_train=False).val)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        SyntaxError("broken PNG file"),
        ValueError("bad header"),
        EOFError(),
        struct.error("unpack"),
        zlib.error("incorrect data"),
        Image.DecompressionBombError("Image size (9 pixels) exceeds limit of 8 pixels"),
        MemoryError(),
        AttributeError("a decoder's own fault"),
        OverflowError("too large"),
        KeyError("mode"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_of_a_decoder_names_the_file(root, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("quadmamba.data.images.Image.open", fail)
    with pytest.raises(DataError, match=r"ant/0\.png: \w+"):
        list(build_loaders(make_cfg(root), with_train=False).val)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_of_validation_and_counts(root, workers):
    for name in ("ant/0", "ant/1", "ant/2", "bee/0", "cat/1"):  # the first batch has none left
        spoil(root / "val" / f"{name}.png")
    cfg = make_cfg(root, DATA__ON_ERROR="skip", DATA__WORKERS=workers)
    loader = build_loaders(cfg, with_train=False).val
    assert len(skipped_images(loader)) == 0
    for _ in range(2):
        batches = list(loader)
        assert [targets.tolist() for _, targets in batches] == [[1, 2]]
        assert len(skipped_images(loader)) == 5


def test_skip_keeps_the_size_of_training_batches(root):
    for name in ("ant/3", "ant/4", "bee/0", "cat/3"):
        spoil(root / "train" / f"{name}.png")
    loader = build_loaders(make_cfg(root, DATA__ON_ERROR="skip", DATA__WORKERS=2)).train
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        assert [len(images) for images, _ in loader] == [4, 4, 4]
    assert len(skipped_images(loader)) == 4


def test_skip_gives_up_where_nothing_can_be_read(root):
    for path in root.glob("train/*/*.png"):
        spoil(path)
    with pytest.raises(DataError, match="13 images in a row"):
        list(build_loaders(make_cfg(root, DATA__ON_ERROR="skip")).train)


# ------------------------------------------------------------------------------------ bad input
def no_validation_folder(root):
    (root / "val").rename(root / "test")


def no_class_folders(root):
    for folder in (root / "train").iterdir():
        folder.rename(root / folder.name)


def empty_class(root):
    (root / "train" / "dog").mkdir()
    (root / "val" / "dog").mkdir()
    (root / "val" / "dog" / "notes.txt").write_text("no image")


def other_classes(root):
    (root / "train" / "ant").rename(root / "train" / "asp")


BAD_FOLDERS = {
    "missing": (no_validation_folder, {}, r"no such folder: .*/val\n.*train/ and val/"),
    "flat": (no_class_folders, {}, "one sub-folder a class in .*/train"),
    "empty": (empty_class, {}, "found none in dog"),
    "mismatch": (other_classes, {}, r"only in train/ \(1\): asp\nonly in val/ \(1\): ant"),
    "batch": (None, {"DATA__BATCH_SIZE": 14}, "at most 13, .* 13 images .* got 14"),
    "odd": (None, {"DATA__BATCH_SIZE": 5}, "DATA.BATCH_SIZE: expected an even number"),
    "head": (None, {"MODEL__NUM_CLASSES": 4}, "MODEL.NUM_CLASSES: expected 0 or the 3 class"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_explained(root, case):
    change, flags, message = BAD_FOLDERS[case]
    if change:
        change(root)
    with pytest.raises(DataError, match=message):
        build_loaders(make_cfg(root, **flags))


def test_the_batch_limit_counts_ranks(root):
    with pytest.raises(DataError, match=r"at most 3, .* for 4 process\(es\)"):
        build_loaders(make_cfg(root), rank=3, world_size=4)


def test_an_empty_path_is_explained():
    with pytest.raises(DataError, match="--data-path"):
        build_loaders(make_cfg(""))


LEAVE = """
import sys
from quadmamba.configs import load_cfg
from quadmamba.data import build_loaders

keys = {"DATA.PATH": sys.argv[1], "DATA.WORKERS": 2, "DATA.BATCH_SIZE": 2, "DATA.IMG_SIZE": 32}
kept = build_loaders(load_cfg(flags=keys))
next(iter(kept.train))
batches = iter(kept.val)
next(batches)
print("leaving")
"""


def test_a_process_that_keeps_its_loaders_can_leave(tmp_path):
    code, out, err = finish(start(["-c", LEAVE, write_images(tmp_path)]), timeout=40)
    assert (code, out) == (0, "leaving\n"), err
