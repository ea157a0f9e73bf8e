"""Signals, numbers that are not finite, ranks that die, and disks and data that go away."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from runs import (
    arguments,
    compare,
    fill_up,
    finish,
    run,
    start,
    start_ranks,
    state_of,
    write_images,
)

FLAGS = ("--batch-size", 4, "--epochs", 2)
FAULTY = "tests/faulty.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=20, val=4)


def words_of(data, out, *faults, **opts):
    return [FAULTY, *faults, "--", *arguments("--data-path", data, "--output", out, *FLAGS, **opts)]


def folder_of(out):
    return out / "quadmamba_lite" / "default"


def wait_for(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def has_stepped(out, updates):
    log = folder_of(out) / "log.jsonl"
    return lambda: log.is_file() and log.read_text().count('"kind": "train"') >= updates


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_3_and_nothing_is_lost(data, tmp_path, number):
    process = start(words_of(data, tmp_path, "delay=0.2"))
    wait_for(has_stepped(tmp_path, 2))
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 3, err
    assert f"ended by signal {int(number)}" in out
    updates = state_of(tmp_path)["updates"]
    assert 2 <= updates < 20
    assert out.count("\nepoch ") == updates  # the step under way was finished, and saved
    assert run("--data-path", data, "--output", tmp_path, *FLAGS) == 0
    assert run("--data-path", data, "--output", tmp_path / "whole", *FLAGS) == 0
    compare(state_of(tmp_path / "whole"), state_of(tmp_path))


def test_a_signal_to_one_rank_stops_both_even_in_a_validation(data, tmp_path):
    ranks = start_ranks(words_of(data, tmp_path, "delay=0.1", "slow_validation=3"))
    wait_for(has_stepped(tmp_path, 5))
    time.sleep(1)
    ranks[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in ranks]
    assert [code for code, _, _ in ends] == [3, 3], ends
    saved = state_of(tmp_path)
    assert (saved["epoch"], saved["step"], saved["metrics"]) == (0, 5, {})


def test_a_second_signal_ends_at_once(data, tmp_path):
    process = start(words_of(data, tmp_path, "delay=30"))
    log = folder_of(tmp_path) / "log.jsonl"
    wait_for(lambda: log.is_file() and log.read_text())
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, _, _ = finish(process, timeout=5)
    assert code == 128 + signal.SIGTERM


def test_nan_on_one_rank_is_skipped_by_both(data, tmp_path):
    ends = [finish(p) for p in start_ranks(words_of(data, tmp_path, "nan=2", "count=2", "rank=1"))]
    assert [code for code, _, _ in ends] == [0, 0], ends
    lines = [json.loads(li) for li in (folder_of(tmp_path) / "log.jsonl").read_text().splitlines()]
    skipped = [line["skipped"] for line in lines if line["kind"] == "train"]
    assert skipped == [0, 0, 1, 2, *[2] * 6]
    assert "skipped 2" in ends[0][1]


def test_ten_in_a_row_on_one_rank_stop_the_run_and_name_the_module(data, tmp_path):
    ends = [finish(p) for p in start_ranks(words_of(data, tmp_path, "nan=0", "rank=1"))]
    assert [code for code, _, _ in ends] == [2, 2], ends
    err = "".join(err for _, _, err in ends)
    assert err.count("error: ") == 1
    assert "10 steps in a row were not finite (TRAIN.MAX_BAD_STEPS)" in err
    assert "rank 1: output of module stages.0.0.mlp (Mlp)" in err
    assert "Traceback" not in err


def test_the_traceback_of_a_rank_that_crashes_comes_to_rank_0(data, tmp_path):
    ends = [finish(p) for p in start_ranks(words_of(data, tmp_path, "raise=3", "rank=1"))]
    assert [code for code, _, _ in ends] == [1, 1], ends
    assert "rank 1 failed" in ends[0][2]
    assert "LookupError: a fault on purpose" in ends[0][2]
    assert "tests/faulty.py" in ends[0][2]


def test_a_rank_that_is_frozen_is_named_within_the_timeout(data, tmp_path):
    ranks = start_ranks(words_of(data, tmp_path, "delay=0.1", RANK_TIMEOUT=0.1))
    wait_for(has_stepped(tmp_path, 2))
    ranks[1].send_signal(signal.SIGSTOP)
    before = time.monotonic()
    code, _, err = finish(ranks[0])
    assert code == 1
    assert time.monotonic() - before < 40
    assert "rank 1 on " in err
    assert "no sign of life" in err
    finish(ranks[1], timeout=1, kill=True)


def test_a_rank_that_dies_before_its_first_step_is_named(data, tmp_path):
    ranks = start_ranks(words_of(data, tmp_path, "die_early=1", "rank=1"))
    code, _, err = finish(ranks[0])
    assert code == 1
    assert "rank 1 on " in err
    assert "no sign of life" in err
    finish(ranks[1])


def test_a_full_disk_keeps_the_checkpoint_before(data, tmp_path, capsys):
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 4)
    assert run(*flags, "--epochs", 1) == 0
    last = folder_of(tmp_path) / "last.pth"
    before = last.read_bytes()
    fill_up(last)
    assert run(*flags, "--epochs", 3) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write")
    assert "No space left on device" in err
    assert last.read_bytes() == before


def freeze(folder):
    """Make a folder read-only, also for root; returns what undoes it."""
    if os.geteuid():
        folder.chmod(0o555)
        return lambda: folder.chmod(0o755)
    done = shutil.which("chattr") and not subprocess.call(
        ["chattr", "+i", folder], stderr=subprocess.DEVNULL
    )
    if not done:
        pytest.skip("root, on a file system without immutable folders")
    return lambda: subprocess.check_call(["chattr", "-i", folder])


def test_an_output_folder_that_turns_read_only(data, tmp_path):
    process = start(words_of(data, tmp_path, "delay=0.2", TRAIN__SAVE_MINUTES=1e-6))
    second = folder_of(tmp_path) / "last.1.pth"
    wait_for(second.exists)  # all files that a run opens are open
    undo = freeze(folder_of(tmp_path))
    try:
        code, _, err = finish(process)
    finally:
        process.kill()
        undo()
    assert code == 2, err
    assert "error: cannot write" in err
    assert "ot permitted" in err or "denied" in err
    assert state_of(tmp_path)["updates"] > 0


def test_data_that_goes_away(data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "data")
    process = start(words_of(moved, tmp_path, "delay=0.2", TRAIN__SAVE_MINUTES=1e-6))
    wait_for((folder_of(tmp_path) / "last.pth").exists)
    shutil.rmtree(moved)
    code, _, err = finish(process)
    assert code == 2
    assert "has gone during the training" in err
    assert "the same command goes on from it" in err
    assert "Traceback" not in err
    assert state_of(tmp_path)["updates"] > 0
