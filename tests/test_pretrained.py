"""Weights from elsewhere in whole runs: --eval, --pretrained, --resume, visualize."""

import json

import pytest
import torch
from PIL import Image
from runs import ROOT, TINY, run, write_images

from quadmamba.tools import visualize
from quadmamba.utils.formats import read

FLAGS = ("--batch-size", 4, "--epochs", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=4, val=4)


@pytest.fixture(scope="module")
def best(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run("--data-path", data, "--output", out, *FLAGS) == 0
    return out / "quadmamba_lite" / "default" / "best.pth"


def weights_of(best):
    payload = read(best)
    return payload[payload["best"]["weights"]]


def wrapped(state, prefix="module._orig_mod"):
    return {f"{prefix}.{key}": value for key, value in state.items()}


def headless(state):
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def write(path, payload, *, legacy=False):
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    return path


def accuracy(capsys, data, path):
    assert run("--eval", "--data-path", data, "--pretrained", path, "--batch-size", 4) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    return [line[key] for key in ("loss", "top1", "images")]


def message_of(capsys, code):
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


LAYOUTS = {
    "M1 legacy checkpoint": lambda payload, _: payload,
    "M2 legacy and wrapped": lambda _, state: wrapped(state),
    "M2 Lightning": lambda _, state: {"state_dict": wrapped(state, "net"), "epoch": 1},
    "M2 mmengine": lambda _, state: {"state_dict": wrapped(state, "backbone"), "meta": {}},
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_same_weights_give_the_same_accuracy_in_every_layout(
    data, best, tmp_path, capsys, case
):
    payload = LAYOUTS[case](read(best), weights_of(best))
    path = write(tmp_path / "w.pth", payload, legacy=True)
    assert accuracy(capsys, data, path) == accuracy(capsys, data, best)


def test_M3_a_training_begins_with_a_backbone_and_a_fresh_head(data, best, tmp_path, capsys):
    state = headless(weights_of(best))
    path = write(tmp_path / "w.pth", {"state_dict": wrapped(state, "backbone")})
    flags = ("--data-path", data, "--pretrained", path)
    assert run(*flags, "--output", tmp_path, *FLAGS) == 0
    out = capsys.readouterr().out
    assert f"loaded {len(state)} tensors from model weights of {path}" in out
    assert "new head with fresh values, the file has none" in out
    err = message_of(capsys, run("--eval", *flags, "--batch-size", 4))
    assert "expected weights with a classifier" in err


def test_M2_a_run_goes_on_from_a_file_that_was_wrapped_and_saved_again(
    data, best, tmp_path, capsys
):
    payload = dict(read(best.with_name("last.pth")))
    payload["model"] = wrapped(payload["model"])
    path = write(tmp_path / "w.pth", payload, legacy=True)
    flags = ("--data-path", data, "--output", tmp_path, *FLAGS, "--epochs", 2)
    assert run(*flags, "--resume", path) == 0
    assert "after epoch 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
def test_M1_a_page_of_a_server_is_no_checkpoint(data, tmp_path, capsys, flag):
    path = tmp_path / "best.pth"
    path.write_text("<!DOCTYPE html>\n<html><title>Sign in</title></html>\n")
    flags = ("--data-path", data, "--output", tmp_path, *FLAGS)
    err = message_of(capsys, run(*flags, flag, path))
    assert f"{path} is not a checkpoint: it is a web page" in err


def test_M3_pictures_need_no_head(best, tmp_path, capsys):
    path = write(tmp_path / "w.pth", wrapped(headless(weights_of(best))), legacy=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    words = [tmp_path / "black.png", "--cfg", ROOT / "configs/quadmamba_lite.yaml"]
    words += ["--pretrained", path, "--output", tmp_path / "out", "--opts", "DATA.IMG_SIZE", 32]
    words += [word for pair in TINY.items() for word in pair]
    assert visualize.main([str(word) for word in words]) == 0
    assert "new head with fresh values, the file has none" in capsys.readouterr().out
