"""A recipe that the user made shorter or larger than the data allows."""

import json
import math

import pytest
from runs import ROOT, TINY, write_images
from torch import nn

from quadmamba.configs import ConfigError, load_cfg
from quadmamba.main import main
from quadmamba.utils.optim import build_optimizer, build_scheduler

SHORT = {
    "epochs on the command line": ("", ["TRAIN.EPOCHS", "5"]),
    "epochs in the file": ("TRAIN: {EPOCHS: 5}", []),
    "warm-up in the file": ("TRAIN: {EPOCHS: 40, WARMUP_EPOCHS: 5}", ["TRAIN.EPOCHS", "5"]),
}


def load(tmp_path, text, opts):
    (tmp_path / "a.yaml").write_text(f"TAG: a\n{text}\n")
    return load_cfg(tmp_path / "a.yaml", opts=opts)


@pytest.mark.parametrize(("text", "opts"), SHORT.values(), ids=SHORT)
def test_M4_a_warm_up_that_does_not_fit_takes_a_fifteenth_of_the_updates(tmp_path, text, opts):
    cfg = load(tmp_path, text, [*opts, "TRAIN.LR_BATCH", "0"])
    before = cfg.TRAIN.WARMUP_EPOCHS
    model = nn.Linear(2, 2)
    for param in model.parameters():
        param.decay = "decay"
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer, 30)
    rates = []
    for update in range(150):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update + 1)
    assert rates[:10] == pytest.approx([5e-7 + (5e-4 - 5e-7) * i / 10 for i in range(10)])
    assert max(rates) == rates[10] == pytest.approx(5e-4)
    assert rates[-1] == pytest.approx(5e-6, rel=0.1)
    assert before == cfg.TRAIN.WARMUP_EPOCHS >= cfg.TRAIN.EPOCHS


BOTH = {
    "both in the file": ("TRAIN: {EPOCHS: 5, WARMUP_EPOCHS: 5}", []),
    "both on the command line": ("", ["TRAIN.EPOCHS", "5", "TRAIN.WARMUP_EPOCHS", "20"]),
    "warm-up last": ("TRAIN: {EPOCHS: 5}", ["TRAIN.WARMUP_EPOCHS", "6"]),
}


@pytest.mark.parametrize(("text", "opts"), BOTH.values(), ids=BOTH)
def test_M4_a_warm_up_that_was_set_with_the_epochs_has_to_fit(tmp_path, text, opts):
    with pytest.raises(ConfigError, match="WARMUP_EPOCHS: expected fewer than TRAIN.EPOCHS = 5"):
        load(tmp_path, text, opts)
    assert load(tmp_path, text, [*opts, "MODE", "info"]).MODE == "info"


def train(data, out, *words, **keys):
    tiny = {key: value for key, value in (TINY | keys).items() if "WARMUP" not in key}
    opts = [str(word) for pair in tiny.items() for word in pair]
    cfg = ["--cfg", str(ROOT / "configs/quadmamba_lite.yaml"), "--img-size", "32"]
    paths = ["--data-path", str(data), "--output", str(out), "--batch-size", "2"]
    return main([*cfg, *paths, *words, "--opts", *opts])


def test_M4_epochs_alone_work_and_the_log_says_what_the_warm_up_is(tmp_path, capsys):
    data = write_images(tmp_path / "data", train=4, val=1)
    rare = dict.fromkeys(("TRAIN.EVAL_EVERY", "TRAIN.SAVE_EVERY", "LOG_IMAGES_EVERY"), 9)
    assert train(data, tmp_path, "--epochs", "2", **rare) == 0
    assert (tmp_path / "quadmamba_lite/default/last.pth").is_file()
    out = capsys.readouterr().out
    assert out.count("the warm-up takes 0.133 epochs, as TRAIN.WARMUP_EPOCHS 20 does not fit") == 1
    lines = (tmp_path / "quadmamba_lite/default/log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["epoch"] for e in entries if e["kind"] == "val"] == [2]  # the last epoch is judged
    rates = [entry["lr"] for entry in entries if entry["kind"] == "train"]
    high, low = 5e-4 * 2 / 512, 5e-6 * 2 / 512  # one update of warm-up, 7 along the cosine
    falling = [low + (high - low) * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(8)]
    assert rates == pytest.approx(falling)


def test_M4_a_step_of_more_batches_than_an_epoch_has_is_refused(tmp_path, capsys):
    data = write_images(tmp_path / "data", train=4, val=1)
    assert train(data, tmp_path, "--epochs", "1", **{"TRAIN.ACCUM_STEPS": 5}) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: TRAIN.ACCUM_STEPS: expected at most 4, the batches of an epoch")
    assert train(data, tmp_path, "--epochs", "1", **{"TRAIN.ACCUM_STEPS": 4}) == 0
