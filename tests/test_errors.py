"""Wrong input: one message on stderr, no traceback, exit code 2, on every rank."""

import shutil
import zipfile

import pytest
import torch
from runs import ROOT, TINY, arguments, run, two_ranks, write_images

from quadmamba.configs import load_cfg
from quadmamba.main import main
from quadmamba.models import build_model
from quadmamba.utils.writer import partial_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=4, val=2)


def message_of(capsys, code):
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 24
    return err


def no_data(root):
    shutil.rmtree(root)


def no_val(root):
    shutil.rmtree(root / "val")


def empty_class(root):
    for image in (root / "train" / "class1").iterdir():
        image.unlink()


def other_classes(root):
    (root / "val" / "class1").rename(root / "val" / "klass1")


def bad_train_image(root):
    (root / "train" / "class0" / "2.png").write_bytes(b"no image")


def bad_val_image(root):
    image = root / "val" / "class1" / "1.png"
    image.write_bytes(image.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (no_data, ["no such folder", "--data-path"]),
        (no_val, ["no such folder", "val"]),
        (empty_class, ["class1", "images in every class"]),
        (other_classes, ["class1", "klass1"]),
        (bad_train_image, ["class0/2.png", "DATA.ON_ERROR"]),
        (bad_val_image, ["class1/1.png", "DATA.ON_ERROR"]),
    ],
)
def test_bad_data(tmp_path, capsys, data, spoil, parts):
    root = shutil.copytree(data, tmp_path / "data")
    spoil(root)
    flags = ("--data-path", root, "--output", tmp_path, "--batch-size", 2, "--epochs", 1)
    err = message_of(capsys, run(*flags))
    assert all(part in err for part in parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--batch-size", 100], ["DATA.BATCH_SIZE", "at most 8", "got 100"]),
        (["--batch-size", 0], ["DATA.BATCH_SIZE", "got 0"]),
        (["--data-path", ""], ["DATA.PATH", "empty"]),
        (["--resume", "none.pth"], ["no such checkpoint: none.pth"]),
        (["--pretrained", "none.pth"], ["no such checkpoint: none.pth"]),
        (["--eval"], ["--eval", "--pretrained"]),
        (["--device", "tpu"], ["DEVICE", "auto, cpu, cuda", "tpu"]),
        (["--resume", "a", "--pretrained", "b"], ["TRAIN.RESUME and TRAIN.PRETRAINED"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_flags(tmp_path, capsys, data, flags, parts):
    basic = ["--data-path", data, "--output", tmp_path, "--batch-size", 2, "--epochs", 1]
    words = arguments(*basic, *flags)
    if "--device" in flags:  # the key of the tiny runs would go before it
        place = words.index("DEVICE")
        del words[place : place + 2]
    err = message_of(capsys, main(words))
    assert all(part in err for part in parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    err = message_of(capsys, run("--throughput", DEVICE="cuda"))
    assert "found none" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--cfg", "digits", "quadmamba_small"]),
        (["--cfg", "configs/quadmamba_smal.yaml"], ["no such file", "quadmamba_small.yaml"]),
        (["--opts", "TRAIN.EPOCH", "3"], ["TRAIN.EPOCH", "did you mean TRAIN.EPOCHS"]),
        (["--opts", "TRAIN.EPOCHS", "many"], ["TRAIN.EPOCHS", "expected int", "many"]),
        (["--opts", "TRAIN.EPOCHS"], ["KEY VALUE pairs"]),
    ],
)
def test_bad_configuration(capsys, words, parts, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = ["--cfg", "configs/quadmamba_lite.yaml"] if words and words[0] == "--opts" else []
    err = message_of(capsys, main([*cfg, "--info", *words]))
    assert all(part in err for part in parts)


@pytest.mark.parametrize(
    "words", [["--epoch", "3"], ["--lr", "3"], ["--batch-size", "two"], ["--eval", "--info"]]
)
def test_unknown_flags_and_wrong_types_exit_with_2(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(*words))
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_output_folder_that_cannot_be_written(tmp_path, capsys, data):
    (tmp_path / "file").write_text("")
    flags = ("--data-path", data, "--batch-size", 2, "--output", tmp_path / "file" / "out")
    err = message_of(capsys, run(*flags))
    assert "OUTPUT: expected a folder that can be written" in err


def test_checkpoint_that_cannot_be_written(tmp_path, capsys, data):
    flags = ("--data-path", data, "--batch-size", 2, "--output", tmp_path, "--epochs", 1)
    partial = partial_of(tmp_path / "quadmamba_lite" / "default" / "last.pth").parent
    partial.parent.mkdir(parents=True)
    partial.symlink_to(tmp_path / "nowhere")
    err = message_of(capsys, run(*flags))
    assert "cannot write" in err
    assert "last.pth" in err


def tiny_state(classes, **keys):
    opts = [str(word) for pair in (TINY | keys).items() for word in pair]
    return build_model(
        load_cfg(ROOT / "configs/quadmamba_lite.yaml", opts=opts), classes
    ).state_dict()


def text(path):
    path.write_text("this is not a checkpoint")


def cut_off(path):
    torch.save({"model": tiny_state(2)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


def other_shapes(path):
    torch.save({"model": tiny_state(2, **{"MODEL.DIMS": "[16,16,24,32]"})}, path)


def missing_keys(path):
    state = tiny_state(2)
    del state["head.norm.weight"], state["head.norm.bias"]
    torch.save(state, path)


def other_head(path):
    torch.save(tiny_state(5), path)


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (text, ["not a checkpoint"]),
        (cut_off, ["cut off"]),
        (foreign_zip, ["not a checkpoint"]),
        (other_shapes, ["of another shape", "stem.0.weight (8, 3, 3, 3) for (4, 3, 3, 3)"]),
        (missing_keys, ["2 missing: head.norm.weight, head.norm.bias"]),
        (other_head, ["2 of another shape: head.fc.weight (5, 32) for (2, 32)"]),
    ],
)
def test_bad_checkpoints(tmp_path, capsys, data, write, parts):
    write(tmp_path / "w.pth")
    flags = ("--eval", "--data-path", data, "--pretrained", tmp_path / "w.pth")
    err = message_of(capsys, run(*flags, "--batch-size", 2))
    assert all(part in err for part in parts)


def test_resume_needs_the_checkpoint_of_a_run(tmp_path, capsys, data):
    torch.save({"model": tiny_state(2)}, tmp_path / "w.pth")
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 2, "--epochs", 1)
    err = message_of(capsys, run(*flags, "--resume", tmp_path / "w.pth"))
    assert "use --pretrained" in err


def test_resume_with_other_optimizer_groups(tmp_path, capsys, data):
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 2, "--epochs", 1)
    assert run(*flags) == 0
    capsys.readouterr()
    err = message_of(capsys, run(*flags, TRAIN__DECAY_SSM=True))
    assert "TRAIN.DECAY_SSM" in err


@pytest.mark.parametrize("spoil", [no_data, bad_val_image], ids=["all ranks", "one rank"])
def test_two_ranks_stop_together(tmp_path, data, spoil):
    root = shutil.copytree(data, tmp_path / "data")
    spoil(root)
    flags = ("--data-path", root, "--output", tmp_path, "--batch-size", 2, "--epochs", 1)
    results = two_ranks(["main.py", *arguments(*flags)], timeout=90)
    assert [code for code, _, _ in results] == [2, 2]
    errors = [err for _, _, err in results]
    assert not any("Traceback" in err for err in errors)
    assert sum("error: " in err for err in errors) == 1
