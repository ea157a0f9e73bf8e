"""What stands in a line of the log: means over a window and over ranks, speed and time left."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from quadmamba.configs import load_cfg
from quadmamba.utils import engine
from quadmamba.utils.distributed import World
from quadmamba.utils.logging import RunLog, duration
from quadmamba.utils.metrics import Metrics, Tally, metrics_of
from quadmamba.utils.progress import Agreement, Progress, Window

CPU = torch.device("cpu")


class Clock:
    """The time of the tests."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Twice(World):
    """Two ranks that say the same."""

    def sum(self, values):
        return 2 * values


# --------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize("world", [World(), Twice(size=2)], ids=["one rank", "two"])
def test_a_window_has_the_means_of_its_batches(world, clock):
    window = Window(world)
    for loss in (3.0, 4.0, 8.0):
        window.add(torch.tensor(loss), 6)
        clock.now += 0.5
    window.norm = torch.tensor(2.5)
    assert window.read() == {
        "loss": pytest.approx(5.0),
        "grad_norm": 2.5,
        "images_per_s": pytest.approx(world.size * 18 / 1.5),
        "seconds_per_step": pytest.approx(0.5),
    }
    window.add(torch.tensor(1.0), 4)
    clock.now += 2
    values = window.read()
    assert (values["loss"], values["seconds_per_step"]) == (1.0, 2.0), "a new window"
    assert values["images_per_s"] == pytest.approx(world.size * 2)


def test_a_window_goes_on_after_a_checkpoint_but_its_clock_does_not(clock):
    before, after = Window(World()), Window(World())
    for loss in (1.0, 2.0):
        before.add(torch.tensor(loss), 8)
        clock.now += 1
    state = before.state()
    clock.now += 1000
    after = Window(World())
    after.load_state(state)
    after.add(torch.tensor(6.0), 8)
    clock.now += 2
    values = after.read()
    assert values["loss"] == 3.0
    assert values["images_per_s"] == pytest.approx(4), "8 images in 2 seconds"
    assert values["seconds_per_step"] == pytest.approx(2)
    assert state[1] == 2, "the state is a copy"
    assert state[0].tolist() == [3.0, 16.0]


# ------------------------------------------------------------------------------------- log lines
def report(clock, tmp_path, capsys, *, losses=(2.0, 4.0), skipped=0):
    """The text and the values of the log line of step 5 of 8 in epoch 3 of 4."""
    cfg = load_cfg(flags={"TRAIN.EPOCHS": 4, "TRAIN.WARMUP_EPOCHS": 0})
    log, window = RunLog(tmp_path), Window(World())
    window.norm = torch.tensor(1.234)
    for loss in losses:
        window.add(torch.tensor(loss), 30)
        clock.now += 1.5
    stepper = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"lr": 1.5e-3}, {"lr": 7.0}]),
        skipped=torch.tensor(skipped),
        updates=21,
    )
    progress = Progress(epoch=2, step=5)
    run = SimpleNamespace(stepper=stepper, progress=progress, window=window, log=log, world=World())
    engine._report_steps(cfg, run, 8)
    log.close()
    line = json.loads((tmp_path / "log.jsonl").read_text())
    return capsys.readouterr().out, {k: v for k, v in line.items() if k != "time"}


def test_a_log_line_says_where_the_run_is_how_fast_and_how_long(clock, tmp_path, capsys):
    text, line = report(clock, tmp_path, capsys)
    left = (2 * 8 - 5) * 1.5  # 3 steps of this epoch and 8 of the last
    assert text == (
        "epoch 3/4  step 5/8  loss 3.0000  lr 1.50e-03  norm 1.23  20 img/s  "
        f"eta {duration(left)}\n"
    )
    assert line == {
        "kind": "train",
        "updates": 21,
        "epoch": 3,
        "lr": 1.5e-3,
        "loss": 3.0,
        "grad_norm": pytest.approx(1.234),
        "images_per_s": 20.0,
        "skipped": 0,
    }


def test_skipped_steps_are_in_the_line(clock, tmp_path, capsys):
    text, line = report(clock, tmp_path, capsys, skipped=3, losses=(math.nan, 1.0))
    assert "img/s  skipped 3  eta" in text
    assert (line["skipped"], line["loss"]) == (3, None)


def test_hours_minutes_and_seconds():
    times = {0: "0:00:00", 59.9: "0:00:59", 61: "0:01:01", 3599: "0:59:59", 3600: "1:00:00"}
    times[30 * 3600 + 12 * 60 + 5] = "30:12:05"
    assert {seconds: duration(seconds) for seconds in times} == times


# --------------------------------------------------------------------------------------- metrics
def test_sums_are_taken_in_float32_at_least():
    torch.manual_seed(0)
    logits, targets = torch.randn(500, 10).bfloat16(), torch.randint(10, (500,))
    half, full = Tally(CPU), Tally(CPU)
    half.add(logits, targets)
    full.add(logits.double(), targets)
    assert half.totals.dtype == torch.float64
    torch.testing.assert_close(half.totals, full.totals, rtol=1e-6, atol=0)


def test_metrics_by_hand():
    tally = Tally(CPU)
    logits = torch.log(torch.tensor([[1, 2, 3, 4, 5, 6.0], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]]))
    tally.add(logits, torch.tensor([5, 5, 1]))
    loss = -sum(math.log(p / 21) for p in (6, 1, 2)) / 3
    found = metrics_of(tally.totals)
    assert found.loss == pytest.approx(loss)
    assert (found.top1, found.top5, found.images) == (100 / 3, 200 / 3, 3)
    assert str(found) == f"top-1 33.33 %  top-5 66.67 %  loss {loss:.4f}  images 3"
    assert found.as_dict() == {"loss": found.loss, "top1": 100 / 3, "top5": 200 / 3, "images": 3}


def test_with_few_classes_the_first_five_are_all():
    tally = Tally(CPU)
    tally.add(torch.randn(7, 3), torch.randint(3, (7,)))
    assert metrics_of(tally.totals).top5 == 100
    assert metrics_of(torch.zeros(4)) == Metrics(0.0, 0.0, 0.0, 0)
    assert metrics_of(torch.tensor([0.5, 1, 1, 1])) == Metrics(0.5, 100.0, 100.0, 1)


# ------------------------------------------------------------------------------ what ranks agree
@pytest.mark.parametrize("world", [World(), Twice(size=2)], ids=["one rank", "two"])
def test_on_a_cpu_the_answer_comes_at_once(world):
    agreement = Agreement(world)
    bad = torch.tensor(4)
    assert agreement.ask(False, False, bad) == (False, False, 4)
    assert agreement.ask(True, False, bad) == (True, False, 4)
    assert agreement.ask(False, True, torch.tensor(0)) == (False, True, 0)
    agreement.saved()
    assert agreement.ask(False, True, torch.tensor(0)) == (False, True, 0), "a new wish"


def test_the_next_epoch_begins_with_nothing_taken():
    progress = Progress(epoch=3, step=7, images=56)
    progress.next_epoch()
    assert (progress.epoch, progress.step, progress.images) == (4, 0, 0)
    assert Progress() == Progress(0, 0, 0, {}, {})
