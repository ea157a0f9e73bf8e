"""The check of an image folder: each kind of bad file is told apart, and counted."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import finish, start, write_images

from quadmamba.tools.check_data import main


def save(path, mode="RGB", side=64):
    rng = np.random.default_rng(0)
    shape = (side, side) if mode == "L" else (side, side, len(mode))
    Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8), mode).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def folder(tmp_path):
    root = write_images(tmp_path / "data", train=3, val=2)
    train = root / "train" / "class0"
    (train / "empty.png").touch()
    (train / "text.jpg").write_text("no image")
    (train / "notes.txt").write_text("no image by its name")
    (root / "train" / "class9").mkdir()
    for name in ("cut.png", "cut.jpg"):
        save(train / name)
        cut(train / name)
    save(train / "grey.png", "L")
    save(train / "alpha.png", "RGBA")
    return root


def test_every_kind_is_found(folder, tmp_path, capsys):
    assert main([str(folder), "--workers", "2", "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["unreadable"] == ["train/class0/text.jpg"]
    assert found["empty"] == ["train/class0/empty.png"]
    assert found["truncated"] == ["train/class0/cut.jpg", "train/class0/cut.png"]
    assert found["not_rgb"] == {"train/class0/alpha.png": "RGBA", "train/class0/grey.png": "L"}
    assert found["empty_classes"] == ["train/class9"]
    assert found["classes"]["train/class0"] == 9
    assert (found["images"], found["other_files"]) == (16, 1)
    text = capsys.readouterr().out
    for name in ("text.jpg", "empty.png", "cut.jpg", "cut.png", "grey.png  L", "train/class9"):
        assert name in text


def test_a_sound_folder_and_none(tmp_path, capsys):
    root = write_images(tmp_path / "data", train=2, val=1)
    assert main([str(root), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert main([str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_it_runs_from_the_root(folder):
    code, out, err = finish(start(["tools/check_data.py", folder]))
    assert code == 1, err
    assert "truncated: 2" in out


def test_links_are_followed_and_classes_without_images_are_named(tmp_path):
    root = tmp_path / "subset"
    source = write_images(tmp_path / "whole", train=4, val=2)
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        for label in ("class0", "class1"):
            (root / part / label).symlink_to(source / part / label)
    assert main([str(root), "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["images"] == 12
    (source / "train" / "class0" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "train" / "notes").mkdir()
    (root / "train" / "notes" / "readme.txt").write_text("no image")
    assert main([str(root), "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["unreadable"] == ["train/class0/gone.jpg"]
    assert found["empty_classes"] == ["train/notes"]
