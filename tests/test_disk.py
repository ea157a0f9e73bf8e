"""Disks that take no more, and when a checkpoint is on the disk."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, arguments, files_of_at_most, run, state_of, write_images

from quadmamba.utils import engine, files, writer
from quadmamba.utils.board import Board
from quadmamba.utils.checkpoint import read_run
from quadmamba.utils.files import OutputError
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.logging import RunLog
from quadmamba.utils.stepper import Stepper
from quadmamba.utils.writer import CheckpointWriter, save, save_file, write_tensors

FLAGS = ("--batch-size", 4, "--epochs")
FOLDER = "quadmamba_lite/default"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


def payload(number):
    """The checkpoint of a run, with 4 MB of weights and 1 MB beside them."""
    keys = "optimizer scaler skipped bad_in_row step images metrics best ranks layout"
    tensors = {"model": {"w": torch.full((1_000_000,), 1.0)}, "optimizer": torch.ones(250_000)}
    about = {"format": 2, "ema": None, "updates": number, "epoch": number}
    return {**dict.fromkeys(keys.split(), 0), **about, **tensors}


class Full(io.BytesIO):
    """A file on a disk that takes some bytes, and then says an error."""

    def __init__(self, number):
        super().__init__()
        self.left, self.number = 1_000_000, number

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(data)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "No space left on device: the file takes 5.0 MB, 7.0 MB are free"),
        (errno.EDQUOT, "Disk quota exceeded: the file takes 5.0 MB, 7.0 MB are free"),
        (errno.EIO, "Input/output error; the file before is kept"),
        (errno.EFBIG, "File too large; the file before is kept"),
    ],
)
def test_C7_what_the_disk_says_is_told(tmp_path, monkeypatch, number, text):
    path, path_open = tmp_path / "last.pth", Path.open
    save(path, payload(1))
    monkeypatch.setattr(files, "_free", lambda _: 7_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda p, mode="r": Full(number) if mode == "wb" else path_open(p, mode)
        )
        with pytest.raises(CheckpointError) as caught:
            save(path, payload(2))
    assert str(caught.value).startswith(f"cannot write {path}: {text}")
    assert str(caught.value).endswith("; the file before is kept")
    assert read_run(path)["updates"] == 1
    assert sorted(os.listdir(tmp_path)) == ["last.pth", "last.safetensors"]


def test_C7_of_both_formats(tmp_path):
    for name, write in (
        ("w.pth", lambda path: writer.write_checkpoint(path, payload(1))),
        ("w.safetensors", lambda path: write_tensors(path, payload(1)["model"], {})),
    ):
        said = pytest.raises(CheckpointError, match=rf"cannot write .*/{name}: File too large$")
        with files_of_at_most(2_000_000), said:
            save_file(tmp_path / name, write)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("before", [True, False])
def test_C7_what_to_do_next_is_told(tmp_path, before):
    writing = CheckpointWriter(tmp_path, keep=1)
    if before:
        writing.submit(payload(1), ["last.pth"])
        writing.wait()
    then = f"goes on from {tmp_path}/last.pth" if before else "begins anew"
    said = pytest.raises(CheckpointError, match=f"Once there is room the same command {then}")
    with files_of_at_most(2_000_000), said:
        writing.submit(payload(2), ["best.pth", "last.pth"])
        writing.wait()


def test_C7_a_log_on_a_full_disk_has_whole_lines_only(tmp_path):
    log = RunLog(tmp_path)
    log.record("model", 0, params=1)
    size = (tmp_path / "log.jsonl").stat().st_size
    said = pytest.raises(OutputError, match="cannot write the log: File too large; the last")
    with files_of_at_most(size + 10), said:
        log.record("model", 0, params=2)
    assert (tmp_path / "log.jsonl").stat().st_size == size


@pytest.mark.parametrize("which", ["log", "events"])
def test_C7_a_run_ends_where_its_log_cannot_be_written(data, tmp_path, monkeypatch, capsys, which):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if which == "log":
        (tmp_path / FOLDER).mkdir(parents=True)
        (tmp_path / FOLDER / "log.jsonl").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(Board, "_add", lambda *_: (_ for _ in ()).throw(full))
    assert run("--data-path", data, "--output", tmp_path, *FLAGS, 1) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: OUTPUT: cannot write the log: No space left on device: ")
    assert " MB are free on the disk of " in err
    assert "Traceback" not in err


def test_C7_a_disk_that_fills_up_under_a_run(data, tmp_path):
    """A real one: a file system in memory with room for one checkpoint and a part of another."""
    assert run("--data-path", data, "--output", tmp_path / "a", *FLAGS, 1) == 0
    need = sum(path.stat().st_size for path in (tmp_path / "a" / FOLDER).iterdir())
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={need + 250_000} tmpfs {disk}"
    if os.geteuid() or subprocess.call(["unshare", "-m", "sh", "-c", mount]):
        pytest.skip("may not mount a file system")
    words = arguments("--data-path", data, "--output", disk, *FLAGS, 3, TRAIN__KEEP=1)
    program = shlex.join([sys.executable, "main.py", *words])
    script = f"{mount} && {program}; code=$?; cp -r {disk} {kept}; exit $code"
    command = ["unshare", "-m", "sh", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: cannot write {disk}/{FOLDER}/")
    assert "No space left on device: the file takes " in done.stderr
    assert "Traceback" not in done.stderr
    assert f"the same command goes on from {disk}/{FOLDER}/last.pth" in done.stderr
    assert state_of(kept)["epoch"] == 1
    for line in (kept / FOLDER / "log.jsonl").read_text().splitlines():
        json.loads(line)
    assert not (kept / FOLDER / "run.lock").exists()
    shutil.rmtree(kept / FOLDER / ".best.pth.partial", ignore_errors=True)
    assert run("--data-path", data, "--output", kept, *FLAGS, 3) == 0


def test_C9_the_writer_is_no_less_urgent_than_the_training(tmp_path, monkeypatch):
    """A thread of low priority gets nothing on a machine with other work."""
    found = []
    monkeypatch.setattr(
        writer, "save", lambda *_, **__: found.append(os.getpriority(os.PRIO_PROCESS, 0))
    )
    writing = CheckpointWriter(tmp_path, keep=1)
    writing.submit({}, ["last.pth"])
    writing.wait()
    assert found == [os.getpriority(os.PRIO_PROCESS, 0)]


@pytest.mark.parametrize("minutes", [0.0, 1e-6], ids=["of an epoch", "inside it"])
def test_C9_training_waits_for_the_checkpoint_of_an_epoch_only(
    data, tmp_path, monkeypatch, minutes
):
    """It takes until the last step of the next epoch, where that does not wait for it."""
    steps, done, all_steps = [], [], threading.Event()
    update, write = Stepper.update, writer.save

    def counted(self):
        time.sleep(0.1)
        steps.append(self.updates)
        if len(steps) == 8:
            all_steps.set()
        return update(self)

    def slow(path, what, *, keep):
        late = what["epoch"] == 1 if minutes == 0 else what["step"] == 1 and not what["epoch"]
        if late and path.name == "last.pth":
            all_steps.wait(2)
            done.append(len(steps))
        write(path, what, keep=keep)

    monkeypatch.setattr(Stepper, "update", counted)
    monkeypatch.setattr(writer, "save", slow)
    monkeypatch.setattr(engine, "_LATE_S", 0.15)
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 4, "--epochs", 2)
    assert run(*flags, TRAIN__SAVE_MINUTES=minutes) == 0
    if minutes:
        assert done[0] == 4, "the steps of the epoch"
    else:
        assert 4 < done[0] <= 7, "some steps, then a wait"
