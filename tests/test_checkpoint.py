"""Checkpoints: atomic writing, strict loading, and files that are none."""

import os
import pickle
import threading
import time

import pytest
import safetensors.torch
import torch
from runs import fill_up
from torch import nn

from quadmamba.utils import writer
from quadmamba.utils.checkpoint import (
    FORMAT,
    CheckpointError,
    load_pretrained,
    newest_run,
    read,
    read_run,
)
from quadmamba.utils.writer import CheckpointWriter, partial_of, save


class Net(nn.Module):
    """Has a classifier under the name that the models give it."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(4, 4)
        self.head = nn.Module()
        self.head.fc = nn.Linear(4, classes)


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def equal(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def both(path, model_top1, ema_top1):
    """A file with both kinds of weights; returns them."""
    states = {"model": Net(seed=1).state_dict(), "ema": Net(seed=2).state_dict()}
    metrics = {"model": {"top1": model_top1}, "ema": {"top1": ema_top1}}
    torch.save({**states, "metrics": metrics if model_top1 is not None else {}}, path)
    return states


def run_of(number, ema=None):
    """The checkpoint of a run, told apart by its number."""
    keys = "optimizer scaler skipped bad_in_row step images metrics best ranks layout"
    return {
        **dict.fromkeys(keys.split(), 0),
        **{"format": FORMAT, "model": Net(seed=number).state_dict(), "ema": ema},
        **{"updates": number, "epoch": number},
    }


def numbers(folder):
    """Which checkpoint lies under each name."""
    return {path.name: read_run(path)["updates"] for path in sorted(folder.glob("*.pth"))}


def test_a_failed_write_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save(path, run_of(1))

    def half(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.torch, "save", half)
    with pytest.raises(CheckpointError, match="No space left"):
        save(path, run_of(2))
    assert numbers(tmp_path) == {"last.pth": 1}
    assert sorted(os.listdir(tmp_path)) == ["last.pth", "last.safetensors"]


def test_the_last_ones_and_the_best_stay(tmp_path):
    writing = CheckpointWriter(tmp_path, keep=3)
    for number in range(1, 6):
        writing.submit(run_of(number), ["best.pth", "last.pth"] if number == 2 else ["last.pth"])
    writing.wait()
    expected = {"best.pth": 2, "last.1.pth": 4, "last.2.pth": 3, "last.pth": 5}
    assert numbers(tmp_path) == expected


def test_two_best_ones_leave_one_file(tmp_path):
    writing = CheckpointWriter(tmp_path, keep=3)
    for number in (1, 2):
        writing.submit(run_of(number), ["best.pth", "last.pth"])
    writing.wait()
    assert numbers(tmp_path) == {"best.pth": 2, "last.1.pth": 1, "last.pth": 2}


def test_a_snapshot_is_not_changed_by_what_follows(tmp_path, monkeypatch):
    go_on = threading.Event()

    def slow(path, payload, *, keep):
        go_on.wait()
        save(path, payload, keep=keep)

    monkeypatch.setattr(writer, "save", slow)
    writing, payload = CheckpointWriter(tmp_path, keep=1), run_of(1)
    weight = payload["model"]["body.weight"]
    before = weight.clone()
    writing.submit(payload, ["last.pth"])
    weight.zero_()
    assert writing.busy
    assert not (tmp_path / "last.pth").exists()
    go_on.set()
    writing.wait()
    assert torch.equal(read_run(tmp_path / "last.pth")["model"]["body.weight"], before)


def test_an_error_of_the_thread_comes_with_the_next_checkpoint(tmp_path):
    writing = CheckpointWriter(tmp_path, keep=1)
    fill_up(tmp_path / "last.pth")
    writing.submit(run_of(1), ["last.pth"])
    while writing.busy:
        time.sleep(0.01)
    assert writing.failed
    with pytest.raises(CheckpointError, match="No space left"):
        writing.submit(run_of(2), ["last.pth"])


@pytest.mark.parametrize("name", ["last.pth", "last.safetensors"])
def test_whatever_library_finds_that_it_cannot_write_the_error_is_ours(tmp_path, name):
    save(tmp_path / "last.pth", run_of(1))
    before = (tmp_path / name).read_bytes()
    partial_of(tmp_path / name).mkdir(parents=True)
    (partial_of(tmp_path / name) / "file").touch()
    with pytest.raises(CheckpointError, match=f"cannot write .*{name}.*the file before is kept"):
        save(tmp_path / "last.pth", run_of(2))
    assert (tmp_path / name).read_bytes() == before


def test_a_save_clears_what_a_killed_one_left(tmp_path):
    for name in ("last.pth", "last.safetensors"):
        partial_of(tmp_path / name).parent.mkdir()
        (partial_of(tmp_path / name).parent / ".tmpAbCdEf").touch()
    save(tmp_path / "last.pth", run_of(1))
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "last.safetensors"}


def test_a_run_clears_what_a_killed_one_left_of_any_file(tmp_path):
    partial_of(tmp_path / "best.pth").parent.mkdir()
    partial_of(tmp_path / "best.pth").touch()
    CheckpointWriter(tmp_path, keep=1)
    assert not list(tmp_path.iterdir())


def test_weights_may_be_read_by_whoever_may_read_the_checkpoint(tmp_path):
    before = os.umask(0o022)
    try:
        save(tmp_path / "last.pth", run_of(1))
    finally:
        os.umask(before)
    for end in ("pth", "safetensors"):
        assert (tmp_path / f"last.{end}").stat().st_mode & 0o777 == 0o644


def test_weights_lie_beside_as_safetensors(tmp_path):
    ema = Net(seed=5).state_dict()
    save(tmp_path / "last.pth", run_of(1, ema=ema))
    model = Net()
    report = load_pretrained(model, tmp_path / "last.safetensors", adapt_head=False)
    assert equal(model, ema)
    assert report.loaded == 4


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_one_flipped_byte_is_detected_wherever_it_is(tmp_path):
    path = tmp_path / "last.pth"
    save(path, run_of(1))
    size = path.stat().st_size
    places = [*range(0, size, size // 200), *range(size - 100, size)]
    for place in places:
        flip(path, place)
        with pytest.raises(CheckpointError, match="damaged|not a checkpoint"):
            read(path)
        flip(path, place)
    assert read_run(path)["updates"] == 1
    assert torch.load(path, weights_only=True)["updates"] == 1  # still a file of torch.save


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, spoil):
    for number in (1, 2, 3):
        save(tmp_path / "last.pth", run_of(number), keep=3)
    last = tmp_path / "last.pth"
    if spoil == "flip":
        flip(last, 1000)
    elif spoil == "cut":
        last.write_bytes(last.read_bytes()[:-500])
    else:  # killed between two renames
        last.unlink()
    path, refused = newest_run(tmp_path)
    assert path == tmp_path / "last.1.pth"
    assert read_run(path)["updates"] == 2
    assert len(refused) == (spoil != "remove")
    assert all(str(last) in reason for reason in refused)


def test_older_files_are_tried_by_their_numbers(tmp_path):
    for number in (10, 9, 2):
        save(tmp_path / f"last.{number}.pth", run_of(number))
    assert newest_run(tmp_path) == (tmp_path / "last.2.pth", [])
    flip(tmp_path / "last.2.pth", 1000)
    path, refused = newest_run(tmp_path)
    assert path == tmp_path / "last.9.pth"
    assert ["last.2.pth" in reason for reason in refused] == [True]


def test_no_checkpoint_and_none_that_is_whole(tmp_path):
    assert newest_run(tmp_path) is None
    assert newest_run(tmp_path / "none") is None
    (tmp_path / "last.pth").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be used"):
        newest_run(tmp_path)


@pytest.mark.parametrize("kind", ["bare", "model", "wrapped", "safetensors", "checkpoint"])
def test_every_kind_of_file_loads(tmp_path, kind):
    state = Net(seed=1).state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "wrapped":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    elif kind == "checkpoint":
        torch.save({"model": state, "ema": None, "epoch": 3, "config": {"A": {"B": 1}}}, path)
    else:
        torch.save(state if kind == "bare" else {"model": state}, path)
    model = Net()
    report = load_pretrained(model, path, adapt_head=False)
    assert equal(model, state)
    assert (report.source, report.loaded, report.adapted) == ("model", 4, ())
    assert report.config == ({"A": {"B": 1}} if kind == "checkpoint" else {})
    assert str(path) in str(report)


@pytest.mark.parametrize(
    ("weights", "model_top1", "ema_top1", "expected"),
    [
        ("auto", 70.0, 60.0, "model"),
        ("auto", 60.0, 70.0, "ema"),
        ("auto", 70.0, 70.0, "ema"),
        ("auto", None, None, "ema"),
        ("model", 60.0, 70.0, "model"),
        ("ema", 70.0, 60.0, "ema"),
    ],
)
def test_the_better_weights_are_taken_unless_named(
    tmp_path, weights, model_top1, ema_top1, expected
):
    states = both(tmp_path / "w.pth", model_top1, ema_top1)
    model = Net()
    report = load_pretrained(model, tmp_path / "w.pth", adapt_head=False, weights=weights)
    assert report.source == expected
    assert equal(model, states[expected])


def test_average_that_is_not_there(tmp_path):
    torch.save({"model": Net().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="expected ema weights"):
        load_pretrained(Net(), tmp_path / "w.pth", adapt_head=False, weights="ema")


def test_misfits_are_counted_and_named_and_change_nothing(tmp_path):
    state = Net(seed=1).state_dict()
    del state["body.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["body.weight"] = torch.zeros(5, 4)
    torch.save(state, tmp_path / "w.pth")
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model, tmp_path / "w.pth", adapt_head=True)
    text = str(caught.value)
    assert "1 missing: body.bias" in text
    assert "1 unexpected: extra.weight" in text
    assert "1 of another shape: body.weight (5, 4) for (4, 4)" in text
    assert equal(model, before)


def test_a_head_of_another_size_only_when_adapting(tmp_path):
    torch.save(Net(classes=7, seed=1).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="2 of another shape: head.fc.weight"):
        load_pretrained(Net(), tmp_path / "w.pth", adapt_head=False)
    model = Net()
    fresh = model.head.fc.weight.clone()
    report = load_pretrained(model, tmp_path / "w.pth", adapt_head=True)
    assert report.adapted == ("head.fc.weight", "head.fc.bias")
    assert "new head" in str(report)
    assert torch.equal(model.head.fc.weight, fresh)
    assert torch.equal(model.body.weight, Net(seed=1).body.weight)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"model": Evil(trap)}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(trap)))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(CheckpointError):
            load_pretrained(Net(), tmp_path / name, adapt_head=False)
    assert not trap.exists()
    pickle.loads((tmp_path / "evil.pkl").read_bytes())  # the trap itself works
    assert trap.exists()


def test_weights_alone_cannot_be_continued(tmp_path):
    torch.save({"model": Net().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="use --pretrained"):
        read_run(tmp_path / "w.pth")
