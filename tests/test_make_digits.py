"""tools/make_digits.py: counts, split, repeatability and where the cluttered digits are."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from runs import files_of_at_most
from sklearn.datasets import load_digits

from quadmamba.configs import load_cfg
from quadmamba.data import build_loaders
from quadmamba.tools import make_digits as tool


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "plain"
    assert tool.main([str(out)]) == 0
    return out


@pytest.fixture
def few(monkeypatch):
    """The first 20 training and 10 validation digits, so that canvases take little time."""
    split = tool.load_split()
    part = {"train": 20, "val": 10}
    few = {
        name: (images[: part[name]], labels[: part[name]])
        for name, (images, labels) in split.items()
    }
    monkeypatch.setattr(tool, "load_split", lambda: few)
    return few


def read_all(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_counts_and_stratification(plain):
    counts = {
        part: Counter(p.parent.name for p in plain.glob(f"{part}/*/*.png"))
        for part in ("train", "val")
    }
    assert {part: sum(c.values()) for part, c in counts.items()} == {"train": 1437, "val": 360}
    for label, total in Counter(load_digits().target.tolist()).items():
        assert abs(counts["val"][str(label)] - total * 360 / 1797) < 1


def test_the_split_is_disjoint_and_complete():
    split = tool.load_split()
    images = np.concatenate([part[0] for part in split.values()]).reshape(1797, 64)
    everything = np.rint(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, 64)
    assert sorted(map(bytes, images)) == sorted(map(bytes, everything))


def test_files_hold_the_digits(plain):
    images, labels = tool.load_split()["val"]
    for index in (0, 359):
        path = plain / "val" / str(labels[index]) / f"{index:05d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), images[index])


def test_the_same_command_writes_the_same_bytes(plain, tmp_path):
    assert tool.main([str(tmp_path / "again")]) == 0
    assert read_all(tmp_path / "again") == read_all(plain)


def test_digits_load_like_any_image_folder(plain):
    flags = {"DATA.PATH": str(plain), "DATA.IMG_SIZE": 32, "DATA.WORKERS": 0, "DATA.BATCH_SIZE": 8}
    loaders = build_loaders(load_cfg(flags=flags))
    assert loaders.classes == [str(i) for i in range(10)]
    images, _ = next(iter(loaders.val))
    assert images.shape == (8, 3, 32, 32)


@pytest.mark.usefixtures("few")
def test_clutter_repeats_by_seed(tmp_path):
    def write(name, *options):
        assert tool.main([str(tmp_path / name), "--cluttered", "--size", "64", *options]) == 0
        return read_all(tmp_path / name)

    first = write("a", "--seed", "1")
    assert len([name for name in first if name.endswith(".png")]) == 30
    assert write("b", "--seed", "1") == first
    other = write("c", "--seed", "2")
    assert sum(other[name] == data for name, data in first.items() if name.endswith(".png")) == 0


def test_clutter_takes_more_images(few, tmp_path):
    out = tmp_path / "more"
    counts = ["--train", "45", "--val", "12"]
    assert tool.main([str(out), "--cluttered", "--size", "48", *counts]) == 0
    files = sorted(out.glob("train/*/*.png"), key=lambda path: path.name)
    assert [int(path.parent.name) for path in files] == [few["train"][1][i % 20] for i in range(45)]
    assert len({path.read_bytes() for path in files}) == 45
    assert len(list(out.glob("val/*/*.png"))) == 12


@pytest.mark.usefixtures("few")
def test_fewer_strokes_leave_more_black(tmp_path):
    ink = []
    for strokes in (0, 8, 48):
        out = tmp_path / str(strokes)
        assert tool.main([str(out), "--cluttered", "--strokes", str(strokes)]) == 0
        ink.append(np.mean([np.asarray(Image.open(p)) >= 128 for p in out.glob("*/*/*.png")]))
    assert 0 < 2 * ink[0] < ink[1] < 0.6 * ink[2]


def test_positions_say_where_the_digit_is(few, tmp_path):
    out = tmp_path / "digits"
    assert tool.main([str(out), "--cluttered"]) == 0
    with open(out / "positions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {str(p.relative_to(out)) for p in out.glob("*/*/*.png")}
    for row in rows:
        part, label, name = row["file"].split("/")
        index, side = int(name[:5]), int(row["side"])
        images, labels = few[part]
        assert int(label) == labels[index]
        assert 11 <= side <= 45, "10 to 40 % of 112"
        top, left = (round(float(row[key]) - side / 2) for key in ("center_y", "center_x"))
        assert 0 <= top <= 112 - side
        assert 0 <= left <= 112 - side
        canvas = np.asarray(Image.open(out / row["file"]))
        digit = tool._scaled(images[index], side, side)
        shown = canvas[top : top + side, left : left + side]
        ink = np.asarray(digit) >= tool.FAINT
        assert (abs(shown[ink].astype(int) - np.asarray(digit)[ink]) < tool.FAINT).all()
        assert (canvas >= 128).sum() > 1.3 * (shown >= 128).sum(), "strokes around the digit"


def test_finished_folders_stay_and_others_are_refused(plain, capsys, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    assert tool.main([str(plain)]) == 0
    assert "already" in capsys.readouterr().out
    assert tool.main([str(plain), "--cluttered"]) == 2
    assert "new or empty" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == before
    (tmp_path / "file").write_text("")
    assert tool.main([str(tmp_path / "file")]) == 2


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("options", [[], ["--cluttered"]], ids=["plain", "cluttered"])
def test_C10_a_place_that_takes_no_more_is_named_and_left_clean(tmp_path, capsys, options):
    with files_of_at_most(60):
        code = tool.main([str(tmp_path / "digits"), *options])
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'digits'}: expected a place that can be written")
    assert "File too large" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few")
def test_a_damaged_marker_is_no_marker(tmp_path, capsys):
    (tmp_path / "digits.json").write_text("{")
    assert tool.main([str(tmp_path)]) == 2
    assert "new or empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "64"], "--size expected to go with --cluttered"),
        (["--seed", "0", "--val", "9"], "--seed and --val expected to go with --cluttered"),
        (["--cluttered", "--size", "8"], "--size 32 or more, got 8"),
        (["--cluttered", "--train", "0"], "--train 10 or more, got 0"),
        (["--cluttered", "--strokes", "-1"], "--strokes 0 or more, got -1"),
    ],
)
def test_wrong_options_exit_with_2(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main([str(tmp_path / "out"), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
