"""Class names travel with the weights: the data's are compared with them in every command."""

import json
import shutil
import unicodedata

import pytest
import safetensors
import torch
from runs import ROOT, TINY, run, write_images

from quadmamba.configs import load_cfg
from quadmamba.data import build_loaders
from quadmamba.models import build_model
from quadmamba.utils.checkpoint import load_pretrained
from quadmamba.utils.classes import check_same, difference, names_in, rows_of, same
from quadmamba.utils.formats import CheckpointError, read

NAMES = ["ant", "bee", "cat"]
FLAGS = ("--batch-size", 4, "--epochs", 1)


def rename(root, names):
    """Give the class folders of both parts other names, or remove those called None."""
    for part in ("train", "val"):
        for before, after in names.items():
            folder = root / part / before
            shutil.rmtree(folder) if after is None else folder.rename(root / part / after)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("data"), train=4, val=6, classes=3)
    return rename(root, {f"class{i}": name for i, name in enumerate(NAMES)})


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run("--data-path", data, "--output", out, *FLAGS, "--epochs", 2) == 0
    return out / "quadmamba_lite" / "default"


@pytest.fixture
def renamed(data, tmp_path):
    """The data with ant and bee under other names: they change their places in the order."""
    copy = shutil.copytree(data, tmp_path / "renamed")
    return rename(copy, {"ant": "formica", "bee": "apis"})


def evaluated(capsys, *flags):
    """The last line of --eval, and all that it said."""
    assert run("--eval", *flags, "--batch-size", 4) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def message_of(capsys, code):
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


# ---------------------------------------------------------------------------------- in the files
def test_W2_names_are_in_every_file_of_a_run(trained):
    for name in ("last.pth", "best.pth"):
        assert torch.load(trained / name, weights_only=True)["classes"] == NAMES
    for name in ("last.safetensors", "best.safetensors"):
        with safetensors.safe_open(trained / name, "pt") as file:
            assert json.loads(file.metadata()["classes"]) == NAMES
            assert json.loads(file.metadata()["config"])["MODEL"]["DIMS"] == [8, 16, 24, 32]


def test_W2_the_log_begins_with_configuration_names_and_versions(trained):
    first = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "run"
    assert first["classes"] == NAMES
    assert first["config"]["TRAIN"]["EPOCHS"] == 2
    assert first["versions"]["torch"] == str(torch.__version__)


# ----------------------------------------------------------------------------------- other names
@pytest.mark.parametrize("file", ["best.pth", "best.safetensors"])
def test_W2_evaluation_on_renamed_folders_is_an_error_that_lists_them(
    renamed, trained, capsys, file
):
    flags = ("--eval", "--data-path", renamed, "--pretrained", trained / file, "--batch-size", 4)
    err = message_of(capsys, run(*flags))
    assert str(trained / file) in err
    assert "only in the weights (2 of 3): ant, bee\n" in err
    assert "only in the data (2 of 3): apis, formica\n" in err
    assert "order of the weights: ant, bee, cat\n" in err
    assert "order of the data: apis, cat, formica\n" in err


@pytest.mark.parametrize("explicit", [True, False], ids=["resume", "auto"])
def test_W2_a_run_does_not_go_on_with_renamed_folders(renamed, trained, tmp_path, capsys, explicit):
    shutil.copytree(trained, tmp_path / "quadmamba_lite" / "default")
    more = ("--resume", trained / "last.pth", "--tag", "b") if explicit else ()
    flags = ("--data-path", renamed, "--output", tmp_path, *FLAGS, "--epochs", 3)
    err = message_of(capsys, run(*flags, *more))
    assert "only in the data (2 of 3): apis, formica" in err
    assert "another --tag" in err


def test_W2_fine_tuning_to_as_many_other_classes_gets_a_new_head(
    renamed, trained, tmp_path, capsys
):
    flags = ("--data-path", renamed, "--output", tmp_path, *FLAGS)
    assert run(*flags, "--pretrained", trained / "best.pth") == 0
    out = capsys.readouterr().out
    assert "new head with fresh values, the weights are for other classes" in out
    assert "only in the data (2 of 3): apis, formica" in out
    last = tmp_path / "quadmamba_lite" / "default" / "last.pth"
    assert torch.load(last, weights_only=True)["classes"] == ["apis", "cat", "formica"]


def test_W2_a_new_head_is_fresh_and_the_same_classes_keep_theirs(trained):
    old = build(3).head.fc.weight.clone()
    model = build(3)
    report = load_pretrained(
        model, trained / "best.pth", adapt_head=True, classes=["apis", "cat", "formica"]
    )
    assert report.adapted == ("head.fc.weight", "head.fc.bias")
    assert torch.equal(model.head.fc.weight, old)
    report = load_pretrained(model, trained / "best.pth", adapt_head=True, classes=NAMES)
    assert report.adapted == ()
    assert "by name" not in str(report), "there is nothing to tell"
    assert not torch.equal(model.head.fc.weight, old)
    fewer = load_pretrained(build(2), trained / "best.pth", adapt_head=True, classes=NAMES[1:])
    assert fewer.adapted == ("head.fc.weight", "head.fc.bias")


# ------------------------------------------------------------------------------------- by name
def build(classes):
    opts = [str(word) for pair in TINY.items() for word in pair]
    torch.manual_seed(0)
    return build_model(load_cfg(ROOT / "configs/quadmamba_lite.yaml", opts=opts), classes)


def accuracy_by_hand(data, weights, classes):
    """Top-1 and loss of the whole head's outputs for `classes`, in this order."""
    opts = [str(word) for pair in TINY.items() for word in pair]
    flags = {"DATA.PATH": str(data), "DATA.IMG_SIZE": 32, "MODE": "eval"}
    loaders = build_loaders(
        load_cfg(ROOT / "configs/quadmamba_lite.yaml", flags, opts), with_train=False
    )
    model = build(3)
    load_pretrained(model, weights, adapt_head=False)
    model.eval()
    columns = [NAMES.index(name) for name in classes]
    with torch.no_grad():
        parts = [(model(images)[:, columns], targets) for images, targets in loaders.val]
    logits, targets = (torch.cat(part) for part in zip(*parts))
    top1 = 100 * (logits.argmax(1) == targets).float().mean().item()
    return top1, torch.nn.functional.cross_entropy(logits, targets).item()


@pytest.mark.parametrize("classes", [["ant", "cat"], ["bee", "cat"]], ids=str)
def test_W2_some_of_the_classes_are_judged_by_their_names(data, trained, tmp_path, capsys, classes):
    copy = shutil.copytree(data, tmp_path / "some")
    rename(copy, {name: None for name in NAMES if name not in classes})
    line, out = evaluated(capsys, "--data-path", copy, "--pretrained", trained / "best.pth")
    assert "2 of its 3 classes, in the data's order, picked by name" in out
    top1, loss = accuracy_by_hand(copy, trained / "best.pth", classes)
    assert line["top1"] == pytest.approx(top1)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("adapt", [False, True], ids=["eval", "train"])
def test_W2_the_same_classes_in_another_order_are_put_in_the_data_s(trained, tmp_path, adapt):
    payload = read(trained / "best.pth")
    name = "ema" if payload["best"]["weights"] == "ema" else "model"
    order = [2, 0, 1]
    state = dict(payload[name])
    for key in ("head.fc.weight", "head.fc.bias"):
        state[key] = state[key][order]
    path = tmp_path / "w.pth"
    torch.save({"model": state, "classes": [NAMES[i] for i in order]}, path)
    model = build(3)
    report = load_pretrained(model, path, adapt_head=adapt, classes=NAMES)
    assert "3 of its 3 classes, in the data's order" in str(report)
    assert all(torch.equal(v, payload[name][key]) for key, v in model.state_dict().items())


def test_rows_of_a_sparse_head_are_not_picked(trained, tmp_path):
    state = dict(read(trained / "best.pth")["model"])
    state["head.fc.weight"] = state["head.fc.weight"].to_sparse()
    torch.save({"model": state, "classes": NAMES[::-1]}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight \(sparse_coo\)"):
        load_pretrained(build(3), tmp_path / "w.pth", adapt_head=False, classes=NAMES)


def test_W2_files_without_names_say_so(data, trained, tmp_path, capsys):
    payload = {key: v for key, v in read(trained / "last.pth").items() if key != "classes"}
    torch.save(payload, tmp_path / "old.pth")
    _, out = evaluated(capsys, "--data-path", data, "--pretrained", tmp_path / "old.pth")
    assert "names no classes: its outputs are taken for the data's in sorted order" in out
    flags = ("--data-path", data, "--output", tmp_path, *FLAGS, "--epochs", 3)
    assert run(*flags, "--resume", tmp_path / "old.pth") == 0
    out = capsys.readouterr().out
    assert "names no classes: they are taken for those of the data" in out
    assert "after epoch 2 of 3" in out


def test_W2_fewer_outputs_than_classes_cannot_be_picked_without_names(trained, tmp_path):
    torch.save({"model": read(trained / "best.pth")["model"]}, tmp_path / "w.pth")
    message = r"head.fc.weight \(3, 32\) for \(2, 32\).*have 2 classes.*does not name its own"
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(build(2), tmp_path / "w.pth", adapt_head=False, classes=["ant", "cat"])


def test_W2_names_that_do_not_fit_their_own_head_are_an_error(trained, tmp_path):
    state = read(trained / "best.pth")["model"]
    torch.save({"model": state, "classes": ["ant", "bee"]}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="expected a head of 2 outputs.* got 3"):
        load_pretrained(build(3), tmp_path / "w.pth", adapt_head=False, classes=NAMES)


# ------------------------------------------------------------------------------------ the lists
def test_W2_accents_are_compared_however_they_are_encoded():
    names = ["cafe\u0301", "nai\u0308f"]  # a letter and its accent apart, as some file systems do
    whole = [unicodedata.normalize("NFC", name) for name in names]
    assert names != whole
    assert same(names, whole)
    assert rows_of(names, whole[::-1]) == [1, 0]
    check_same(names, whole, "here")


def test_rows_of_names():
    assert rows_of(NAMES, ["cat", "ant"]) == [2, 0]
    assert rows_of(NAMES, ["cat", "dog"]) is None
    assert not same(NAMES, ["ant", "bee"])
    assert not same(NAMES, ["bee", "ant", "cat"])


def test_long_lists_are_cut_and_strange_names_can_be_printed():
    many = [f"n{i:04d}" for i in range(1000)]
    lines = difference(many, ["\udce9t\udce9", *many[1:]]).splitlines()
    assert lines[0] == "  only in the weights (1 of 1000): n0000"
    assert lines[1] == "  only in the data (1 of 1000): \\udce9t\\udce9"
    assert all(len(line) < 120 for line in lines)
    "\n".join(lines).encode("ascii")


@pytest.mark.parametrize("value", [None, 3, "abc", [1, 2], {"a": 0}, [["a"]]])
def test_lists_of_other_kinds_are_no_names(value):
    assert names_in({"classes": value}, "here") == ()


def test_names_that_come_twice_are_an_error():
    with pytest.raises(CheckpointError, match="each class once"):
        names_in({"classes": ["a", "a"]}, "here")
