"""The check of an image folder: each kind of bad file is told apart, and counted."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from runs import finish, run, start, write_images

from quadmamba.configs import load_cfg
from quadmamba.data import DataError, build_loaders
from quadmamba.tools.check_data import Checked, main
from quadmamba.utils.isolation import map_isolated


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


# ----------------------------------------------------------------------------- as a training does
def scan(root, *flags):
    """Exit code and findings."""
    report = root.parent / "report.json"
    code = main([str(root), "--json", str(report), "--workers", "2", *map(str, flags)])
    return code, json.loads(report.read_text())


def test_W1_depth_colours_and_orientation_are_listed(tmp_path):
    root = write_images(tmp_path / "data", train=2, val=1)
    ant = root / "train" / "class0"
    exif = Image.Exif()
    exif[274] = 6
    grey = np.full((8, 8), 40000, np.uint16)
    Image.fromarray(grey).save(ant / "deep.png")
    Image.fromarray(grey.astype(np.float32)).save(ant / "float.tif")
    Image.new("CMYK", (8, 8)).save(ant / "print.jpg")
    Image.new("RGB", (8, 8)).save(ant / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 8)).save(ant / "turned.png", exif=exif)
    code, found = scan(root)
    assert code == 1
    assert found["unreadable"] == ["train/class0/float.tif"]
    assert "floating-point" in found["reasons"]["train/class0/float.tif"]
    assert found["not_rgb"] == {
        "train/class0/deep.png": "I;16",
        "train/class0/print.jpg": "CMYK",
        "train/class0/turned.png": "RGBA",
    }
    assert found["exif_orientation"] == {
        "train/class0/turned.jpg": 6,
        "train/class0/turned.png": 6,
    }


def test_what_is_read_with_complaints_is_doubtful_and_not_bad(tmp_path, capsys):
    root = write_images(tmp_path / "data", train=2, val=1)
    ant = root / "train" / "class0"
    Image.new("RGB", (8, 8)).save(ant / "junk.jpg")
    content = (ant / "junk.jpg").read_bytes()
    (ant / "junk.jpg").write_bytes(content[:20] + b"junk" + content[20:])
    content = bytearray((ant / "0.png").read_bytes())
    place = content.find(b"IDAT")
    content[place + 4 + int.from_bytes(content[place - 4 : place], "big")] ^= 255
    (ant / "0.png").write_bytes(content)
    assert scan(root)[0] == 0
    code, found = scan(root)
    assert (code, list(found["doubtful"])) == (0, ["train/class0/0.png", "train/class0/junk.jpg"])
    out = capsys.readouterr().out
    assert "checksum in b'IDAT'" in out
    assert "extraneous bytes" in out


def test_W5_W7_the_same_folders_as_in_a_training(tmp_path, capsys):
    root = write_images(tmp_path / "data", train=2, val=1)
    ant = root / "train" / "class0"
    shutil.copytree(ant, root / "train" / ".ipynb_checkpoints")
    (ant / "._0.png").write_bytes(b"\0\5\x16\7")
    (ant / "again").symlink_to(ant)
    (ant / "a.heic").touch()
    (root / "train" / "loose.png").touch()
    code, found = scan(root)
    assert (code, found["images"]) == (0, 6)
    assert found["hidden"] == ["train/.ipynb_checkpoints", "train/class0/._0.png"]
    assert found["other_files"] == 2
    keys = {"DATA.PATH": str(root), "DATA.IMG_SIZE": 32, "DATA.BATCH_SIZE": 2, "DATA.WORKERS": 0}
    assert found["notes"] == build_loaders(load_cfg(flags=keys)).notes
    assert all(f"note: {note}" in capsys.readouterr().out for note in found["notes"][:1])


def test_what_libraries_print_becomes_the_reason(tmp_path, capfd):
    root = write_images(tmp_path / "data", train=2, val=1)
    path = root / "train" / "class0" / "a.tif"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[1000:1400] = b"\xff" * 400
    path.write_bytes(content)
    code, found = scan(root)
    assert code == 1
    assert "code not yet in table" in found["reasons"]["train/class0/a.tif"]
    assert capfd.readouterr().err == ""


def too_deep(root):
    (root / "val" / "images").mkdir()
    for name in ("class0", "class1"):
        (root / "val" / name).rename(root / "val" / "images" / name)


def no_val(root):
    (root / "val").rename(root / "valid")


def other_names(root):
    (root / "val" / "class1").rename(root / "val" / "klass1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (too_deep, "found one: images"),
        (no_val, "valid: rename it to val"),
        (other_names, "only in train/ (1): class1\nonly in val/ (1): klass1"),
    ],
)
def test_W4_folders_in_the_wrong_place_are_bad(tmp_path, capsys, change, words):
    root = write_images(tmp_path / "data", train=2, val=1)
    change(root)
    code, found = scan(root)
    assert code == 1
    assert any(words in text for text in found["layout"])
    assert words in capsys.readouterr().out
    keys = {"DATA.PATH": str(root), "DATA.IMG_SIZE": 32, "DATA.BATCH_SIZE": 2, "DATA.WORKERS": 0}
    with pytest.raises(DataError) as caught:
        build_loaders(load_cfg(flags=keys))
    assert str(caught.value) in found["layout"]


def test_a_part_alone_and_a_folder_without_classes(tmp_path):
    root = write_images(tmp_path / "data", train=2, val=1)
    code, found = scan(root / "train")
    assert (code, found["images"], found["classes"]) == (0, 4, {"class0": 2, "class1": 2})
    (root / "train" / "class0" / "1.png").write_bytes(b"no image")
    code, found = scan(root / "train" / "class0")
    assert (code, found["images"], found["unreadable"]) == (1, 2, ["1.png"])
    assert "found no folder" in found["layout"][0]


# ------------------------------------------------------------------------------------- the limit
def test_C5_the_limit_is_that_of_a_training_and_has_a_flag(tmp_path, capsys):
    root = write_images(tmp_path / "data", train=2, val=1)
    ant = root / "train" / "class0"
    for name in ("wide.png", "wide.jpg"):
        Image.new("L", (16000, 20)).save(ant / name)
    for limit, code in ((16000 * 20, 0), (16000 * 20 - 1, 1)):
        got, found = scan(root, "--max-pixels", limit)
        assert got == code
        assert found["too_large"] == ["train/class0/wide.jpg", "train/class0/wide.png"] * code
    assert "16000 x 20 = 320,000 pixels, above the limit of 319,999 (DATA.MAX_PIXELS)" in (
        capsys.readouterr().out
    )
    flags = ("--data-path", root, "--output", tmp_path, "--batch-size", 2, "--epochs", 1)
    assert run(*flags, DATA__MAX_PIXELS=319_999) == 2
    assert "320,000 pixels, above the limit of 319,999 (DATA.MAX_PIXELS)" in capsys.readouterr().err


def claim(path, width, height):
    content = bytearray(path.read_bytes())
    if path.suffix == ".png":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        place = content.find(b"\xff\xc0")
        content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    path.write_bytes(content)


def test_C5_huge_images_of_both_decoders_are_one_kind_of_bad(tmp_path):
    root = write_images(tmp_path / "data", train=2, val=1)
    ant = root / "train" / "class0"
    sizes = {"a.jpg": (16000, 12000), "b.png": (20000, 10000), "c.png": (90000, 90000)}
    for name, size in sizes.items():
        Image.new("RGB", (8, 8)).save(ant / name)
        claim(ant / name, *size)
    code, found = scan(root)
    assert (code, found["unreadable"], found["truncated"]) == (1, [], [])
    assert found["too_large"] == [f"train/class0/{name}" for name in sizes]


# --------------------------------------------------------------------- files that end a process
def die(path, **_):
    """Stands for a decoder with a fault of its own."""
    name = os.path.basename(path)
    if name == "crash.png":
        faulthandler.disable()  # says nothing of a signal that is meant
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "killed.png" or (name == "1.png" and _once(path)):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exit.png":
        os._exit(7)
    if name == "hang.png":
        time.sleep(1000)
    return Checked()


def _once(path):
    """Whether this is the first call for a file."""
    try:
        os.mkdir(f"{path}.seen")
    except FileExistsError:
        return False
    return True


def test_C5_the_scan_outlives_files_that_end_or_hang_their_process(tmp_path, monkeypatch, capsys):
    root = write_images(tmp_path / "data", train=9, val=2)
    names = ("crash.png", "exit.png", "hang.png", "killed.png")
    for name in names:
        shutil.copy(root / "train/class0/0.png", root / "train/class1" / name)
    monkeypatch.setattr("quadmamba.tools.check_data.check_file", die)
    code, found = scan(root, "--timeout", 1)
    assert (code, found["images"]) == (1, 26)
    assert found["unreadable"] == [f"train/class1/{name}" for name in names]
    assert [found["reasons"][f"train/class1/{name}"] for name in names] == [
        "ended the process that read it (signal SIGSEGV)",
        "ended the process that read it (exit code 7)",
        "takes longer than 1 seconds",
        "ended the process that read it (signal SIGKILL)",
    ]
    assert "crash.png  ended the process" in capsys.readouterr().out


def test_no_process_is_left_behind():
    before = set(multiprocessing.active_children())
    results = dict(map_isolated(os.path.basename, ["a/b", "c/d", "e"], workers=4, timeout=60))
    assert results == {"a/b": "b", "c/d": "d", "e": "e"}
    assert set(multiprocessing.active_children()) <= before
    assert list(map_isolated(len, [], workers=2, timeout=1)) == []


# ------------------------------------------------------------------------------------ exit codes
@pytest.mark.parametrize(
    ("report", "words"),
    [("nodir/x.json", "No such file"), (".", "the folder"), ("f/x", "Not a dir")],
)
def test_C10_a_report_that_cannot_be_written_is_said_before_the_work(
    tmp_path, capsys, monkeypatch, report, words
):
    root = write_images(tmp_path / "data", train=1, val=1)
    (tmp_path / "f").touch()
    monkeypatch.setattr("quadmamba.tools.check_data.scan", lambda *_: pytest.fail("has begun"))
    assert main([str(root), "--json", str(tmp_path / report)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --json: ")
    assert words in err


def test_C10_a_full_disk_at_the_end_is_said(tmp_path, capsys, monkeypatch):
    root = write_images(tmp_path / "data", train=1, val=1)
    (tmp_path / "x.json").write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert main([str(root), "--json", str(tmp_path / "x.json")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "x.json").read_text() == "old"


def test_C5_a_fault_of_the_check_itself_is_not_taken_for_bad_files(tmp_path, capsys, monkeypatch):
    root = write_images(tmp_path / "data", train=1, val=1)
    monkeypatch.setattr("quadmamba.tools.check_data.survey", lambda _: 1 / 0)
    assert main([str(root)]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_C10_a_console_that_cannot_take_the_report(tmp_path, capsys, monkeypatch):
    root = write_images(tmp_path / "data", train=1, val=1)
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails too
        monkeypatch.setattr("sys.stdout", full)
        assert main([str(root)]) == 2
    assert "error: cannot write the result to stdout: No space left" in capsys.readouterr().err
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(OSError), open(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        assert main([str(root)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--workers", "0"], ["--max-pixels", "-1"], ["--wrong"], []])
def test_wrong_arguments_exit_with_2(tmp_path, words):
    with pytest.raises(SystemExit) as stopped:
        main([*([str(tmp_path)] if words else []), *words])
    assert stopped.value.code == 2


def test_odd_names_are_reported_in_valid_text(tmp_path, capsys):
    root = write_images(tmp_path / "data", train=2, val=1)
    name = os.fsdecode(b"caf\xe9\n.png")
    (root / "train" / "class0" / name).write_bytes(b"no image")
    code, found = scan(root)
    assert (code, found["unreadable"]) == (1, [f"train/class0/{name}"])
    out = capsys.readouterr().out
    assert r"train/class0/caf\xe9\n.png" in out
    out.encode()
