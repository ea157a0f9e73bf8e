"""Runs that are killed, stopped or spoiled, and what comes after: bit for bit the unbroken run."""

import json
import signal

import pytest
from runs import (
    arguments,
    compare,
    finish,
    start,
    state_of,
    two_ranks,
    write_images,
)

MIXED = ("--batch-size", 4, "--epochs", 4)
OPTS = {"TRAIN__ACCUM_STEPS": 2, "TRAIN__SAVE_MINUTES": 1e-6, "MODEL__DROP_PATH": 0.3}
FAULTY = "tests/faulty.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=20, val=5)


def command(data, out, *faults, flags=MIXED, **opts):
    """Words for python: a training with faults."""
    words = arguments("--data-path", data, "--output", out, *flags, **(OPTS | opts))
    return [FAULTY, *faults, "--", *words]


def losses(out):
    """The training lines of a log by step; each step is there once."""
    lines = (out / "quadmamba_lite/default/log.jsonl").read_text().splitlines()
    found = {}
    for entry in map(json.loads, lines):
        if entry["kind"] == "train":
            values = [entry[key] for key in ("epoch", "loss", "lr", "grad_norm", "skipped")]
            assert found.setdefault(entry["updates"], values) is values
    return found


def lives(ranks, data, out, *faults, **options):
    """Run once; the exit codes and the joined outputs of the ranks."""
    words = command(data, out, *faults, **options)
    ends = two_ranks(words) if ranks == 2 else [finish(start(words))]
    return [code for code, _, _ in ends], [text + err for _, text, err in ends]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_in_the_third_epoch_and_continued_gives_the_same_bits(data, tmp_path, ranks):
    """40 images, batch 4, 2 batches a step: 5 steps an epoch on one rank, 3 on two."""
    kill = [f"kill={13 if ranks == 1 else 8}", f"rank={ranks - 1}", "settle=1"]
    opts = {"LOG_EVERY": 2}  # a window of the log is open where the kill comes
    codes, texts = lives(ranks, data, tmp_path / "a", **opts)
    assert codes == [0] * ranks, texts
    codes, texts = lives(ranks, data, tmp_path / "b", *kill, **opts)
    assert codes[-1] == -signal.SIGKILL
    assert 0 not in codes
    if ranks == 2:
        assert "rank 1 on " in texts[0]
        assert "died" in texts[0]
    codes, texts = lives(ranks, data, tmp_path / "b", **opts)
    assert codes == [0] * ranks, texts
    assert "images of the next" in texts[0]
    whole, broken = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    assert whole["updates"] == (20 if ranks == 1 else 12)
    compare(whole, broken)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len(losses(tmp_path / "a")) == whole["updates"] // 2


def test_thirty_kills_at_random_moments_change_nothing(data, tmp_path):
    flags = ("--batch-size", 4, "--epochs", 12)
    opts = {"TRAIN__ACCUM_STEPS": 1, "TRAIN__EVAL_EVERY": 3, "TRAIN__KEEP": 3}
    opts |= {"LOG_IMAGES": 0, "LOG_EVERY": 3}
    report, seed = tmp_path / "kills", 0
    for name, kills in (("whole", 0), ("broken", 30)):
        words = command(data, tmp_path / name, flags=flags, **opts)
        chain = ["tests/kill_chain.py", seed, kills, report, *words[1:]]
        code, out, err = finish(start(chain), timeout=250)
        assert code == 0, f"seed {seed}\n{out[-3000:]}\n{err[-3000:]}"
    places = report.read_text().split()
    assert [places.count(place) for place in ("step", "write", "rename")] == [10, 10, 10]
    compare(state_of(tmp_path / "whole"), state_of(tmp_path / "broken"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
