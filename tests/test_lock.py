"""One run at a time writes to a folder; who comes second is told who does, and changes nothing."""

import errno
import fcntl
import json
import os
import threading
import time
from unittest.mock import Mock

import pytest
from runs import arguments, compare, finish, run, start, state_of, two_ranks, write_images

from quadmamba.utils import lock
from quadmamba.utils.checkpoint import CheckpointError
from quadmamba.utils.files import OutputError
from quadmamba.utils.lock import FolderLock
from quadmamba.utils.writer import CheckpointWriter, holding

FOLDER = "quadmamba_lite/default"
FLAGS = ("--batch-size", 4, "--epochs", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def quick(monkeypatch):
    """The waits of a lock in tenths of seconds."""
    monkeypatch.setattr(lock, "_BEAT_S", 0.05)
    monkeypatch.setattr(lock, "_SILENCE_S", 0.6)
    monkeypatch.setattr(lock, "_POLL_S", 0.02)
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.3)


def leave(folder, **about):
    """What a holder leaves in the lock file; returns the path of that."""
    holder = {"host": "node7", "pid": 7, "since": "then", "command": "c", "token": "t", **about}
    (folder / "run.lock").write_text(json.dumps(holder))
    return folder / "run.lock"


def test_C1_two_runs_that_start_at_the_same_moment(data, tmp_path):
    rounds = int(os.environ.get("MEETINGS", "3"))
    flags, alone = ("--data-path", data, "--batch-size", 4), tmp_path / "alone"
    words = arguments(*flags, TRAIN__EPOCHS=1)
    for epochs in (1, 2):
        assert run(*flags, "--output", alone, TRAIN__EPOCHS=epochs) == 0
    code, out, err = finish(start(["tests/meet.py", rounds, tmp_path, "--", *words]), 50 * rounds)
    assert code == 0, err
    for number, codes in enumerate(json.loads(out)):
        folder = tmp_path / str(number)
        said = [(folder / f"{i}.txt").read_text() for i in range(4)]
        assert sorted(codes[:2]) == [0, 2], said
        assert codes[2:] == [-9, 0], said
        winner, loser = said[codes.index(0)], said[codes.index(2)]
        assert "done: best top-1" in winner
        assert loser.startswith("error: OUTPUT: ")
        assert f"{folder / FOLDER} is in use by process " in loser
        assert "tests/meet.py" in loser  # the command
        assert "--tag" in loser
        assert "continuing" not in winner
        assert "after epoch 1 of 2" in said[3]
        compare(state_of(folder), state_of(alone))
        lines = (folder / FOLDER / "log.jsonl").read_text().splitlines()
        steps = [entry["updates"] for entry in map(json.loads, lines) if entry["kind"] == "train"]
        assert steps == list(range(1, 9))
        assert not (folder / FOLDER / "run.lock").exists()


def test_C1_two_ranks_are_refused_with_one_message(data, tmp_path):
    words = arguments("--data-path", data, "--output", tmp_path, *FLAGS)
    with holding(tmp_path / FOLDER, keep=1):
        (tmp_path / FOLDER / ".best.pth.partial").mkdir()
        before = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
        ends = two_ranks(["main.py", *words])
        assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == before
    assert [code for code, _, _ in ends] == [2, 2]
    assert "Traceback" not in ends[0][2] + ends[1][2]
    assert [err.count(f"is in use by process {os.getpid()} on ") for _, _, err in ends] == [1, 0]


def test_C1_an_evaluation_needs_no_lock(data, tmp_path, capsys):
    flags = ("--data-path", data, "--batch-size", 4)
    assert run(*flags, "--output", tmp_path, "--epochs", 1) == 0
    with holding(tmp_path / FOLDER, keep=1):
        assert run(*flags, "--eval", "--pretrained", tmp_path / FOLDER / "best.pth") == 0
        capsys.readouterr()
        assert run(*flags, "--output", tmp_path, "--epochs", 2) == 2
    assert capsys.readouterr().err.startswith("error: OUTPUT: ")
    assert run(*flags, "--output", tmp_path, "--epochs", 2) == 0


@pytest.mark.usefixtures("quick")
def test_C1_the_lock_of_a_machine_that_has_gone_is_taken_over(tmp_path, capsys):
    leave(tmp_path, machine="another")
    before = time.monotonic()
    holder = FolderLock(tmp_path)
    assert time.monotonic() - before > 0.6
    assert "process 7 on node7" in capsys.readouterr().err
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    holder.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("locked", [False, True], ids=["local locks", "shared locks"])
@pytest.mark.usefixtures("quick")
def test_C1_the_holder_on_another_machine_is_told_by_its_beat(tmp_path, locked):
    path, over = leave(tmp_path, machine="another"), threading.Event()

    def beat():
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with path.open("r+") as file:
            if locked:
                fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(OutputError, match="in use by process 7 on node7 since then: c"):
                FolderLock(tmp_path)
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("quick")
def test_C1_a_lock_that_a_server_keeps_for_a_machine_that_has_gone(tmp_path):
    with leave(tmp_path, machine="another").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        FolderLock(tmp_path).release()


def test_C1_of_a_dead_process_on_this_machine_at_once(tmp_path):
    leave(tmp_path, machine=lock._machine(), pid=os.getpid())  # as in a container that restarts
    before = time.monotonic()
    FolderLock(tmp_path).release()
    assert time.monotonic() - before < 5


@pytest.mark.usefixtures("quick")
def test_C1_without_locks_the_beat_decides(tmp_path, monkeypatch, capsys):
    no_locks = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=no_locks))
    holder = FolderLock(tmp_path)
    assert "has no locks" in capsys.readouterr().err
    with pytest.raises(OutputError, match=f"in use by process {os.getpid()} "):
        FolderLock(tmp_path)
    holder._over.set()  # it dies
    FolderLock(tmp_path).release()


@pytest.mark.usefixtures("quick")
def test_C1_who_comes_back_to_a_folder_that_was_taken_writes_nothing(tmp_path):
    with holding(tmp_path, keep=1) as writer:
        leave(tmp_path, machine="another")
        while not writer.failed:
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match="the folder went to process 7 on node7"):
            writer.submit({}, ["last.pth"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_C1_a_process_that_was_forked_off_holds_nothing(tmp_path):
    """As the loader processes of a run that was killed, which live for some seconds more."""
    holder = FolderLock(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    holder._over.set()
    os.close(holder._file)  # as the end of the parent does
    FolderLock(tmp_path).release()
    os.write(write, b"x")
    os.waitpid(child, 0)


def test_C1_a_lock_that_is_released_while_it_is_looked_at(tmp_path, monkeypatch):
    """Its file is gone then: one that comes next would lock a new one."""
    path, calls, open_file = tmp_path / "run.lock", [], lock._open

    def late(which):
        found = open_file(which)
        if not calls:
            path.unlink()
        calls.append(found)
        return found

    path.touch()
    monkeypatch.setattr(lock, "_open", late)
    holder = FolderLock(tmp_path)
    assert len(calls) == 2
    assert json.loads(path.read_text())["pid"] == os.getpid()
    holder.release()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_C1_a_lock_that_cannot_be_written(tmp_path, what):
    if what == "folder":
        (tmp_path / "run.lock").mkdir()
    else:
        (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="expected a folder that can be written"):
        FolderLock(tmp_path if what == "folder" else tmp_path / "out")


def test_C1_the_folder_stays_locked_until_the_last_checkpoint_is_written(tmp_path, monkeypatch):
    go_on = threading.Event()
    wait = Mock(side_effect=lambda *_, **__: go_on.wait())
    monkeypatch.setattr("quadmamba.utils.writer.save", wait)
    monkeypatch.setattr("quadmamba.utils.writer._LEAVE_S", 0.1)
    with holding(tmp_path, keep=1) as writer:
        writer.submit({}, ["last.pth"])
    try:
        with pytest.raises(OutputError, match="in use by"):
            FolderLock(tmp_path)
    finally:
        go_on.set()
    assert isinstance(writer, CheckpointWriter)
