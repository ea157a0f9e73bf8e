"""A run that goes on: each step once in its logs, the best validation as best.pth has it, and words
about what is not as it was.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import run, state_of, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quadmamba.utils import engine
from quadmamba.utils.checkpoint import read_run
from quadmamba.utils.logging import RunLog
from quadmamba.utils.progress import Progress
from quadmamba.utils.resume import WITHOUT_INFLUENCE, changes
from quadmamba.utils.stepper import Stepper

FOLDER = "quadmamba_lite/default"
BATCH = ("--batch-size", 4)  # 4 steps an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


def life(data, out, monkeypatch, *flags, save=(), die="", **opts):
    """A run that saves after these updates, and dies there without a further word.

    die: "update 6" (in that one), or "save 4" (before the checkpoint after so many updates).
    """
    what, _, number = die.partition(" ")
    update, save_now = Stepper.update, engine.save

    def updated(self):
        if what == "update" and self.updates == int(number) - 1:
            raise KeyboardInterrupt
        return update(self)

    def saved(cfg, run, names):
        if what == "save" and run.stepper.updates == int(number) and not run.progress.step:
            raise KeyboardInterrupt
        save_now(cfg, run, names)
        engine.wait_for_writer(run)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_is_due", lambda _, run: run.stepper.updates in save)
        patch.setattr(Stepper, "update", updated)
        patch.setattr(engine, "save", saved)
        words = ("--data-path", data, "--output", out, *BATCH, *flags)
        if not die:
            return run(*words, **opts)
        with pytest.raises(KeyboardInterrupt):
            run(*words, **opts)
        return None


def records(out, name="log.jsonl"):
    lines = (out / FOLDER / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(out, name="log.jsonl"):
    """(updates of the training lines, epochs of the validations) in the log."""
    found = records(out, name)
    return (
        [entry["updates"] for entry in found if entry["kind"] == "train"],
        [entry["epoch"] for entry in found if entry["kind"] == "val"],
    )


def curves(out):
    """What TensorBoard shows: steps of a training curve, of a validation, of the pictures."""
    events = EventAccumulator(str(out / FOLDER)).Reload()
    pictures = events.Tags()["images"]
    return (
        [event.step for event in events.Scalars("train/loss")],
        [event.step for event in events.Scalars("val/model_top1")],
        [event.step for name in pictures for event in events.Images(name)],
    )


def same_numbers(out, whole):
    """Assert that two logs tell the same of each step, but for times."""
    logs = []
    for folder in (out, whole):
        logs.append([entry for entry in records(folder) if entry["kind"] in ("train", "val")])
        for entry in logs[-1]:
            del entry["time"]
            entry.pop("images_per_s", None)
    assert logs[0] == logs[1]


def test_M6_steps_that_come_again_are_in_the_logs_once(data, tmp_path, monkeypatch):
    opts = {"LOG_IMAGES_EVERY": 1, "LOG_IMAGES": 1}
    life(data, tmp_path / "a", monkeypatch, "--epochs", 2, save=[2, 6], die="update 8", **opts)
    assert steps(tmp_path / "a") == ([1, 2, 3, 4, 5, 6, 7], [1])
    last = tmp_path / "a" / FOLDER / "last.pth"
    last.write_bytes(last.read_bytes()[:-9])  # then that of the first epoch is used
    assert life(data, tmp_path / "a", monkeypatch, "--epochs", 2, **opts) == 0
    assert steps(tmp_path / "a") == (list(range(1, 9)), [1, 2])
    assert curves(tmp_path / "a") == (list(range(1, 9)), [4, 8], [4, 8])
    kinds = [entry["kind"] for entry in records(tmp_path / "a")]
    assert [kinds.count(kind) for kind in ("run", "model", "resume")] == [2, 2, 1]
    assert life(data, tmp_path / "b", monkeypatch, "--epochs", 2, **opts) == 0
    same_numbers(tmp_path / "a", tmp_path / "b")


def test_M6_a_validation_that_was_not_saved_comes_again_once(data, tmp_path, monkeypatch):
    opts = {"LOG_IMAGES_EVERY": 1, "LOG_IMAGES": 1}
    life(data, tmp_path, monkeypatch, "--epochs", 2, save=[4], die="save 4", **opts)
    assert steps(tmp_path) == ([1, 2, 3, 4], [1])
    assert read_run(tmp_path / FOLDER / "last.pth")["step"] == 4
    life(data, tmp_path, monkeypatch, "--epochs", 2, save=[6], die="update 7", **opts)
    assert life(data, tmp_path, monkeypatch, "--epochs", 2, **opts) == 0
    assert steps(tmp_path) == (list(range(1, 9)), [1, 2])
    assert curves(tmp_path) == (list(range(1, 9)), [4, 8], [4, 8])


@pytest.mark.parametrize("auto", [True, False], ids=["nothing saved", "anew"])
def test_M6_a_run_that_begins_anew_has_a_log_of_its_own(data, tmp_path, monkeypatch, auto):
    life(data, tmp_path, monkeypatch, "--epochs", 2, die="update 4" if auto else "update 6")
    before = records(tmp_path)
    flags = ("--epochs", 1)
    assert life(data, tmp_path, monkeypatch, *flags, TRAIN__AUTO_RESUME=auto) == 0
    assert records(tmp_path, "log.1.jsonl") == before
    assert steps(tmp_path) == ([1, 2, 3, 4], [1])
    assert [entry["kind"] for entry in records(tmp_path)][:2] == ["run", "model"]
    assert curves(tmp_path)[:2] == ([1, 2, 3, 4], [4])


def test_M6_a_kill_while_the_log_is_cut_loses_nothing(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    log.record("run", 0)
    for updates in range(1, 6):
        log.record("train", updates, loss=1.0)
    log.close()
    before, replace = (tmp_path / "log.jsonl").read_bytes(), Path.replace

    def killed(self, target):
        if target.name == "log.jsonl":
            raise KeyboardInterrupt
        return replace(self, target)

    again = RunLog(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            again.go_back(3, 0)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    (tmp_path / "log.jsonl").write_bytes(before + b"a line of somebody else\n")
    log = RunLog(tmp_path)
    log.record("run", 0)
    log.go_back(3, 0)
    log.record("resume", 3)
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines[:5] == [*before.decode().splitlines()[:4], "a line of somebody else"]
    assert [json.loads(line)["kind"] for line in lines[5:]] == ["run", "resume"]


def test_M6_events_are_read_in_the_order_of_the_lives(tmp_path):
    """Also where they began within a second, or where the clock went back."""
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "log.jsonl").touch()
    for life in range(12):
        log = RunLog(tmp_path / FOLDER)
        log.go_back(life, 0)
        for updates in (life + 1, life + 2):
            log.record("train", updates, loss=float(life))
        log.record("val", life, epoch=0, model_top1=1.0)
        log.images("partition", torch.zeros(1, 3, 2, 2), life)
        log.close()
    events = EventAccumulator(str(tmp_path / FOLDER)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [*((life + 1, float(life)) for life in range(12)), (13, 11.0)]


def fine(number):
    """A validation that seems the best so far."""

    def judge(self, metrics):
        self.metrics = {name: result.as_dict() for name, result in metrics.items()}
        self.best = {"top1": number + self.epoch, "epoch": self.epoch + 1, "weights": "model"}
        return True

    return judge


def test_M6_the_best_is_what_best_pth_holds(data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "judge", fine(90.0))
        opts = {"TRAIN__SAVE_EVERY": 2}
        life(data, tmp_path, monkeypatch, "--epochs", 4, die="update 14", **opts)
    best = tmp_path / FOLDER / "best.pth"
    before = best.read_bytes()
    assert read_run(tmp_path / FOLDER / "last.pth")["best"]["epoch"] == 2
    assert life(data, tmp_path, monkeypatch, "--epochs", 4) == 0
    expected = {"top1": 92.0, "epoch": 3, "weights": "model"}
    assert state_of(tmp_path)["best"] == read_run(best)["best"] == expected
    assert best.read_bytes() == before
    assert "done: best top-1 92.00 % (model weights of epoch 3)" in capsys.readouterr().out
    best.unlink()
    assert life(data, tmp_path, monkeypatch, "--epochs", 5) == 0
    assert "best.pth of epoch 3 (92.00 %) is not there" in capsys.readouterr().out
    assert read_run(best)["best"]["epoch"] == 5


@pytest.mark.parametrize("newer", [False, True])
def test_M6_the_best_of_another_folder_is_brought_along(data, tmp_path, monkeypatch, capsys, newer):
    out, other = tmp_path / "out", tmp_path / "other"
    assert life(data, other, monkeypatch, "--epochs", 1) == 0
    state = shutil.copy(other / FOLDER / "last.pth", other / FOLDER / "before.pth")
    if newer:
        with monkeypatch.context() as patch:
            patch.setattr(Progress, "judge", fine(90.0))
            assert life(data, other, monkeypatch, "--epochs", 2) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "judge", lambda *_: False)
        assert life(data, out, monkeypatch, "--epochs", 2, "--resume", state) == 0
    text = capsys.readouterr().out
    if newer:
        assert "is not there: the next validation counts as the best" in text
        assert not (out / FOLDER / "best.pth").exists()
    else:
        for name in ("best.pth", "best.safetensors"):
            assert (out / FOLDER / name).read_bytes() == (other / FOLDER / name).read_bytes()
        assert state_of(out)["best"] == read_run(state)["best"]


def test_M5_what_is_not_as_it_was_is_listed(data, tmp_path, monkeypatch, capsys):
    life(data, tmp_path, monkeypatch, "--epochs", 2, save=[2], die="update 4")
    root = shutil.copytree(data, tmp_path / "data")
    shutil.copy(root / "train/class0/0.png", root / "train/class0/again.png")
    capsys.readouterr()
    opts = {"TRAIN__WEIGHT_DECAY": 0.1, "TRAIN__EMA": False, "AUG__MIXUP": 0.2, "LOG_EVERY": 2}
    opts |= {"DATA__WORKERS": 1, "TRAIN__KEEP": 3, "LOG_IMAGES": 0, "TRAIN__AMP": "bf16"}
    assert life(root, tmp_path, monkeypatch, "--epochs", 3, "--seed", 7, **opts) == 0
    out = capsys.readouterr().out
    expected = {
        "DATA.PATH": [str(data), str(root)],
        "AUG.MIXUP": [0.8, 0.2],
        "TRAIN.EPOCHS": [2, 3],
        "TRAIN.WEIGHT_DECAY": [0.05, 0.1],
        "TRAIN.AMP": ["fp16", "bf16"],
        "TRAIN.EMA": [True, False],
        "TRAIN.SEED": [0, 7],
        "training images": [16, 17],
    }
    for key, (then, now) in expected.items():
        assert f"\n  {key}: {then} -> {now}\n" in out
    assert out.count(" -> ") == len(expected)
    assert "TRAIN.SEED and training images: the order of the images is another one" in out
    resumed = next(entry for entry in records(tmp_path) if entry["kind"] == "resume")
    assert resumed["changed"] == expected
    assert state_of(tmp_path)["ema"] is None
    capsys.readouterr()
    assert life(root, tmp_path, monkeypatch, "--epochs", 4, "--seed", 7, **opts) == 0
    assert capsys.readouterr().out.count(" -> ") == 1  # the epochs


def test_M5_a_late_average_begins_with_the_weights(data, tmp_path, monkeypatch, capsys):
    assert life(data, tmp_path, monkeypatch, "--epochs", 1, TRAIN__EMA=False) == 0
    before = state_of(tmp_path)["model"]
    opts = {"TRAIN__EMA_DECAY": 1.0}  # so it keeps what it begins with
    assert life(data, tmp_path, monkeypatch, "--epochs", 2, **opts) == 0
    assert "  TRAIN.EMA: False -> True\n" in capsys.readouterr().out
    after = state_of(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in after["ema"].items())
    assert not torch.equal(after["model"]["stem.0.weight"], before["stem.0.weight"])


def test_M5_keys_without_influence_are_keys_and_all_others_count():
    from quadmamba.configs import load_cfg
    from quadmamba.configs.load import get_key

    cfg = load_cfg()
    for key in WITHOUT_INFLUENCE:
        get_key(cfg, key)
    then = {"TRAIN": {"BETAS": [0.9, 0.999], "EPS": 1e-8, "OLD": 1}, "TAG": "a"}
    now = {"TRAIN": {"BETAS": [0.9, 0.99], "EPS": 1e-8, "NEW": 1}, "TAG": "b"}
    assert changes(then, now) == {"TRAIN.BETAS": [[0.9, 0.999], [0.9, 0.99]]}


@pytest.mark.parametrize("epochs", [1, 2])
def test_M5_nothing_to_do_is_said_and_nothing_is_done(data, tmp_path, monkeypatch, capsys, epochs):
    assert life(data, tmp_path, monkeypatch, "--epochs", 2) == 0
    folder = tmp_path / FOLDER
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert life(data, tmp_path, monkeypatch, "--epochs", epochs, "--seed", 3) == 0
    out = capsys.readouterr().out
    assert f"nothing to do: 2 epochs are done in {folder / 'last.pth'}" in out
    assert f"TRAIN.EPOCHS is {epochs} " in out
    assert "after epoch 2 of 1" not in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
