"""Files of weights by their content: every format loads, all else is named, nothing is executed."""

import argparse
import bz2
import collections
import gzip
import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from quadmamba.utils.formats import CheckpointError, read, read_foreign
from quadmamba.utils.writer import write_checkpoint, write_tensors

STATE = {"stem.weight": torch.arange(12.0).view(3, 4), "head.fc.bias": torch.tensor([1.0, -2.0])}


def write_zip(path):
    torch.save({"model": STATE}, path)


def write_legacy(path):
    torch.save({"model": STATE}, path, _use_new_zipfile_serialization=False)


def write_safetensors(path):
    safetensors.torch.save_file(STATE, path)


FORMATS = {"zip": write_zip, "legacy": write_legacy, "safetensors": write_safetensors}


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_foreign(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------- intact
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin", "w.pth.tar", "w"])
@pytest.mark.parametrize("kind", FORMATS)
def test_M1_a_file_is_read_by_its_content_whatever_its_name(tmp_path, kind, name):
    FORMATS[kind](tmp_path / name)
    state = read(tmp_path / name)["model"]
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_M1_our_checkpoint_loads_where_a_user_saved_it_again(tmp_path, kind):
    write_checkpoint(tmp_path / "last.pth", {"format": 2, "model": STATE})
    payload = torch.load(tmp_path / "last.pth", weights_only=True)
    again = tmp_path / "again.pth"
    torch.save(payload, again, _use_new_zipfile_serialization=kind == "zip")
    assert torch.equal(read(again)["model"]["stem.weight"], STATE["stem.weight"])


def test_notes_in_a_safetensors_file_come_back(tmp_path):
    about = {"weights": "ema", "classes": ["a", "é", "\udce9"], "config": {"MODEL": {"TAU": 1.0}}}
    write_tensors(tmp_path / "w.safetensors", STATE, about)
    payload = read(tmp_path / "w.safetensors")
    assert payload["classes"] == about["classes"]
    assert payload["config"] == about["config"]
    assert payload["ema"].keys() == STATE.keys()
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors", {"classes": "[oh", "a": "b"})
    assert read(tmp_path / "w.safetensors")["classes"] is None, "another project's note"


# ------------------------------------------------------------------------------------ cut off
@pytest.mark.parametrize("kind", FORMATS)
def test_M1_a_file_that_is_cut_off_anywhere_is_named_so(tmp_path, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    FORMATS[kind](path)
    content = path.read_bytes()
    for size in {*range(4, len(content) - 1, 31), len(content) - 1}:
        path.write_bytes(content[:size])
        assert "cut off" in refusal(path), f"{size} of {len(content)} bytes"


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_M1_a_changed_byte_in_another_projects_archive_is_found(tmp_path, member):
    path = tmp_path / "w.pth"
    write_zip(path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read(f"w/{member}")
    whole = path.read_bytes()
    place = whole.index(content) + len(content) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    message = refusal(path)
    assert "damaged" in message
    assert member in message


def test_an_archive_without_checksums_loads(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        write_zip(tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read(tmp_path / "w.pth")["model"].keys() == STATE.keys()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_at_random_never_end_in_a_traceback(tmp_path):
    rng = np.random.default_rng(0)
    for kind, write in FORMATS.items():
        path = tmp_path / kind
        write(path)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        refused = 0
        for _ in range(150):
            content = whole.copy()
            content[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
            path.write_bytes(content.tobytes())
            try:
                read_foreign(path)
            except CheckpointError:
                refused += 1
        assert refused > 60, kind


# ------------------------------------------------------------------------------- other content
def archive_of(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tar_of(content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("w.pth")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def saved(write, *args):
    file = io.BytesIO()
    write(file, *args)
    return file.getvalue()


INDEX = {"metadata": {"total_size": 9}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
OTHERS = {
    "empty": (b"", "empty (0 bytes)"),
    "zeros": (bytes(5000), "zero bytes"),
    "text": (b"404: Not Found", "text that begins with '404: Not Found'"),
    "accents": ("é" * 300, "text that begins with 'éé"),
    "html": (b"\n<!DOCTYPE html>\n<html><title>Sign in", "a web page"),
    "upper html": (b"<HTML><BODY>Forbidden", "a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "a web page"),
    "json": (b'{"error": "not found"}', "text that begins with"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
    "index": (json.dumps(INDEX, indent=2).encode(), "weights in several files"),
    "gzip": (gzip.compress(b"weights"), "gzip; unpack it first"),
    "bzip2": (bz2.compress(b"weights"), "bzip2; unpack it first"),
    "tar": (tar_of(b"weights"), "tar archive; unpack it first"),
    "npz": (saved(np.savez, np.zeros(3)), "arrays of NumPy (arr_0.npy)"),
    "npy": (saved(np.save, np.zeros(3)), "array of NumPy"),
    "some zip": (archive_of(**{"best.pth": b"weights"}), "an archive (best.pth)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "garbage": (np.random.default_rng(0).bytes(4000), "cut off: expected a whole file"),
    "pickle": (pickle.dumps(STATE), "a pickle"),
    "list": (saved(lambda file: torch.save([1], file)), "expected a dict of weights, got list"),
    "tensor": (saved(lambda file: torch.save(torch.zeros(2), file)), "got Tensor"),
}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("case", OTHERS)
def test_M1_what_holds_no_weights_is_called_by_its_name(tmp_path, case, name):
    content, words = OTHERS[case]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    message = refusal(path)
    assert words in message
    assert len(message.splitlines()) == 1


def test_M1_a_program_of_torchscript_is_named_and_not_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert "a TorchScript program" in refusal(tmp_path / "w.pt")


def test_M1_places_that_are_no_file(tmp_path):
    (tmp_path / "run").mkdir()
    assert "is a folder, expected a file" in refusal(tmp_path / "run")
    for name in ("best.pth", "log.jsonl", "best.safetensors"):
        (tmp_path / "run" / name).touch()
    assert "give one of its files: best.pth, best.safetensors" in refusal(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refusal(tmp_path / "pipe")
    assert "no such checkpoint" in refusal(tmp_path / "none.pth")
    assert "no such checkpoint" in refusal(tmp_path / "run" / "best.pth" / "x")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    assert "download it first" in refusal(Path("https://example.org/best.pth"))


def test_M1_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    write_zip(tmp_path / "w.pth")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot read" in refusal(tmp_path / "w.pth")
    assert "Permission denied" in refusal(tmp_path / "w.pth")


# --------------------------------------------------------------------------- foreign objects
class Note:
    """An object of this file, with a state that runs code where it is read by pickle."""

    read = 0

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setstate__(self, state):
        Note.read += 1


class Settings(dict):
    """A dict of another class."""


class System:
    """Calls a function of the operating system where it is read by pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


BESIDE = {
    "args": argparse.Namespace(lr=0.1, names=["a"]),
    "best": np.float64(71.5),
    "curve": np.arange(3.0),
    "config": Settings(MODEL=Settings(DEPTHS=[1])),
    "window": collections.deque([1, 2], maxlen=5),
    "place": Path("/nowhere"),
    "note": Note(a=1),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", BESIDE)
def test_M1_weights_beside_foreign_objects_load_and_nothing_is_executed(tmp_path, key, zipped):
    path = tmp_path / "w.pth"
    payload = {"model": STATE, key: BESIDE[key]}
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    Note.read = 0
    found, foreign = read_foreign(path)
    assert torch.equal(found["model"]["stem.weight"], STATE["stem.weight"])
    assert foreign
    assert Note.read == 0
    with pytest.raises(CheckpointError, match=r"something else than tensors .*can run code"):
        read(path)  # a run that goes on wants all of it
    torch.load(path, weights_only=False)
    assert Note.read == (key == "note"), "the trap works"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_M1_functions_of_the_system_are_refused(tmp_path, zipped):
    trap = System(tmp_path / "trap")
    torch.save({"model": STATE, "x": trap}, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    assert "cannot be read without running its code (posix.mkdir)" in refusal(tmp_path / "w")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_M1_a_pickled_model_is_refused_and_said_how_to_save(tmp_path, zipped):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "w.pth")
    assert "a pickled object (torch.nn.modules.linear.Linear)" in message
    assert "torch.save(model.state_dict(), PATH)" in message
    assert "weights_only" not in message, "no advice to trust the file"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_M1_another_pickle_protocol_is_named(tmp_path, zipped):
    torch.save(
        *({"model": STATE}, tmp_path / "w.pth"),
        pickle_protocol=4,
        _use_new_zipfile_serialization=zipped,
    )
    assert "pickle protocol 4" in refusal(tmp_path / "w.pth")
