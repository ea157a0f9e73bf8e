"""What a run reports: metrics, the best validation, log lines, the progress bar, times."""

import io
import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from quadmamba.utils.logging import RunLog, duration
from quadmamba.utils.metrics import Metrics, Tally, metrics_of
from quadmamba.utils.progress import Agreement, Progress
from quadmamba.utils.rng import rng_state, seed_step, set_rng_state


@pytest.mark.parametrize("classes", [3, 10])
def test_metrics_over_uneven_batches(classes):
    torch.manual_seed(0)
    logits, targets = torch.randn(37, classes), torch.randint(classes, (37,))
    tally = Tally(torch.device("cpu"))
    for part in torch.arange(37).split(8):
        tally.add(logits[part], targets[part])
    found = metrics_of(tally.totals)
    order = logits.argsort(1, descending=True)
    assert found.top1 == 100 * (order[:, 0] == targets).sum().item() / 37
    assert found.top5 == 100 * (order[:, :5] == targets[:, None]).any(1).sum().item() / 37
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert found.images == 37
    assert "images 37" in str(found)


def test_metrics_of_nothing():
    assert metrics_of(torch.zeros(4)) == Metrics(0.0, 0.0, 0.0, 0)


def test_the_best_validation_is_kept():
    def result(top1):
        return Metrics(1.0, top1, 100.0, 10)

    progress = Progress()
    assert progress.judge({"model": result(50.0), "ema": result(50.0)})
    assert progress.best == {"top1": 50.0, "epoch": 1, "weights": "ema"}
    progress.next_epoch()
    assert not progress.judge({"model": result(50.0), "ema": result(40.0)})
    assert progress.best["epoch"] == 1
    assert progress.metrics["ema"]["top1"] == 40.0
    assert progress.judge({"model": result(60.0), "ema": result(40.0)})
    assert progress.best == {"top1": 60.0, "epoch": 2, "weights": "model"}


class _Late:
    """A world whose device answers one step later, as a GPU does."""

    device = SimpleNamespace(type="cuda")

    @staticmethod
    def sum(values):
        return values


@pytest.fixture
def late(monkeypatch):
    to = torch.Tensor.to

    def stay(self, device, **more):
        return self if device is _Late.device else to(self, device, **more)

    monkeypatch.setattr(torch.Tensor, "to", stay)
    event = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(Agreement, "_send", staticmethod(lambda answer: (answer.clone(), event)))
    return Agreement(_Late())


def test_a_late_answer_asks_for_one_save_only(late):
    saved, saves = -10, []
    for step in range(12):
        _, due, _ = late.ask(False, step - saved >= 5, torch.tensor(0))
        if due:
            saves.append(step)
            saved = step
            late.saved()
    assert saves == [1, 7]


def test_a_late_answer_is_heard_in_the_next_epoch(late):
    assert late.ask(True, False, torch.tensor(3)) == (False, False, 0)
    assert late.ask(False, False, torch.tensor(0)) == (True, False, 3)


def test_a_step_is_seeded_by_its_place():
    def draw(*place):
        seed_step(*place)
        return random.random(), np.random.rand(), torch.rand(1).item()

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    for numbers in zip(*(draw(*place) for place in places)):  # of one generator
        assert len(set(numbers)) == len(places)
    assert draw(0, 1, 2, 3) == draw(0, 1, 2, 3)


def test_generators_continue_where_they_were():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(1).item()

    seed_step(0, 0, 0, 0)
    draw()
    state = rng_state(torch.device("cpu"))
    numbers = draw()
    seed_step(1, 0, 0, 0)
    set_rng_state(state, torch.device("cpu"))
    assert draw() == numbers


WHOLE = '{"kind": "model", "updates": 0, "time": 1.0}'


@pytest.mark.parametrize("torn", ['{"kind": "tr', "\0\0\0", WHOLE], ids=["half", "zeros", "no end"])
def test_M6_a_line_cut_off_by_a_kill_leaves_whole_lines_only(tmp_path, torn):
    (tmp_path / "log.jsonl").write_text(f"{WHOLE}\n{torn}")
    log = RunLog(tmp_path)
    log.record("train", 1, loss=1.0)
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines[:-1] == [WHOLE] * (2 if torn == WHOLE else 1)
    assert json.loads(lines[-1])["loss"] == 1.0


def test_log_lines_are_json_whatever_the_numbers(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.record("train", 3, loss=math.nan, lr=1e-3, nested={"x": math.inf}, name="a")
    log.warn("careful")
    log.progress("epoch", 1, 2)
    log.close()
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["kind"], line["updates"], line["loss"]) == ("train", 3, None)
    assert (line["lr"], line["nested"]) == (1e-3, {"x": None})
    captured = capsys.readouterr()
    assert "warning: careful" in captured.out
    assert captured.err == ""


def test_progress_bar_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    log = RunLog()
    log.progress("epoch 1", 5, 10)
    assert "epoch 1 [############............] 5/10" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    RunLog(quiet=True).progress("epoch 1", 5, 10)
    assert sys.stderr.getvalue() == ""


def test_duration():
    assert [duration(s) for s in (0, 61, 3600 * 30 + 5)] == ["0:00:00", "0:01:01", "30:00:05"]
