"""tools/import_release.py: official files in and out, and no code of a file is run."""

import os
import pickle
import re
import zipfile

import pytest
import safetensors.torch
import torch
import yaml
from runs import files_of_at_most, fill_up
from yacs.config import CfgNode

from quadmamba.configs import load_cfg
from quadmamba.models import build_model, from_release
from quadmamba.tools import import_release
from quadmamba.utils.checkpoint import load_pretrained
from quadmamba.utils.formats import read
from tests.literal import official_state

SMALL = {"dims": (16, 24, 32, 40), "depths": (1, 2, 1, 1), "quad": (True, True, False, False)}
SMALL |= {"ratio": 1.5, "n": 2, "mlp_ratio": 2.5, "classes": 7}


def official_file(path, **extra):
    """A file as the official trainer writes it; returns its plain and its averaged weights."""
    plain, average = (official_state(**SMALL, seed=seed) for seed in (0, 1))
    config = CfgNode({"MODEL": {"TYPE": "vssm", "DEPTHS": [1, 2]}})
    config.freeze()
    payload = {"model": plain, "model_ema": average, "config": config, "epoch": 3, **extra}
    torch.save(payload, path)
    return plain, average


@pytest.mark.parametrize("ema", [False, True])
def test_an_official_file_becomes_weights_and_a_configuration(tmp_path, capsys, ema):
    states = official_file(tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    words = [str(tmp_path / "in.pth"), str(out), *(["--ema"] if ema else [])]
    assert import_release.main(words) == 0
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "out.yaml")]
    cfg = load_cfg(tmp_path / "out.yaml")
    assert cfg.MODEL.ORDERS == ["release", "release", "raster", "raster"]
    assert (cfg.MODEL.DIMS, cfg.MODEL.NUM_CLASSES, cfg.MODEL.D_STATE) == ([16, 24, 32, 40], 7, 2)
    model = build_model(cfg)
    load_pretrained(model, out, adapt_head=False)
    wanted = from_release(states[ema]).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_there_and_back_again(tmp_path):
    plain, _ = official_file(tmp_path / "in.pth")
    files = [str(tmp_path / name) for name in ("in.pth", "ours.safetensors", "back.pth")]
    assert import_release.main(files[:2]) == 0
    assert import_release.main([*files[1:], "--export", "--cfg", str(tmp_path / "ours.yaml")]) == 0
    back = torch.load(files[2], weights_only=True)["model"]
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[key], value) for key, value in plain.items())


class Trap:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    trap = tmp_path / "trap"
    official_file(tmp_path / "in.pth", scheduler=Trap(trap))
    code = import_release.main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")])
    assert not trap.exists()
    assert code == 2, "functions of the system are refused altogether"
    assert "cannot be read without running its code" in capsys.readouterr().err
    official_file(tmp_path / "in.pth", scheduler=HarmlessTrap())
    assert import_release.main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 0
    assert not HarmlessTrap.sprung
    with open(tmp_path / "pickle", "wb") as file:
        pickle.dump(HarmlessTrap(), file)
    pickle.loads((tmp_path / "pickle").read_bytes())
    assert HarmlessTrap.sprung, "the trap works"


class HarmlessTrap:
    """Pickles as a call of a function of this file."""

    sprung = False

    def __reduce__(self):
        return spring, ()


def spring():
    HarmlessTrap.sprung = True


def _cut(path):
    official_file(path)
    path.write_bytes(path.read_bytes()[:5000])


def _zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")


BAD = {
    "missing": (lambda path: path.parent, [], "no such checkpoint"),
    "cut off": (_cut, [], "not a checkpoint, or it is cut off"),
    "some zip": (_zip, [], "damaged or not a checkpoint"),
    "no average": (
        lambda path: torch.save({"model": official_state(**SMALL)}, path),
        ["--ema"],
        "expected tensors under 'model_ema', got keys model",
    ),
    "another model": (
        lambda path: torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, path),
        [],
        "keys such as fc.weight",
    ),
    "a list": (lambda path: torch.save([1], path), [], "expected a dict of weights, got list"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_imported_is_named(tmp_path, capsys, case):
    make, flags, message = BAD[case]
    make(tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    assert import_release.main([str(tmp_path / "in.pth"), str(out), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_grey_images_and_other_endings_are_refused(tmp_path, capsys):
    plain, _ = official_file(tmp_path / "in.pth")
    plain["patch_embed.0.weight"] = plain["patch_embed.0.weight"][:, :1]
    torch.save(plain, tmp_path / "grey.pth")
    for name, out, message in (
        ("grey.pth", "out.safetensors", "expected 3 input channels, got 1"),
        ("in.pth", "out.pth", "expected a name that ends in .safetensors"),
        ("in.pth", "no/out.safetensors", "cannot write"),
    ):
        assert import_release.main([str(tmp_path / name), str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err


def test_a_model_of_another_order_is_not_exported(tmp_path, capsys):
    tree = {"MODEL": {"DIMS": [8] * 4, "DEPTHS": [1] * 4, "NUM_CLASSES": 3}}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(tree))
    model = build_model(load_cfg(tmp_path / "ours.yaml"))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "ours.safetensors")
    files = [str(tmp_path / "ours.safetensors"), str(tmp_path / "out.pth")]
    assert import_release.main([*files, "--export", "--cfg", str(tmp_path / "ours.yaml")]) == 2
    assert "expected a scan of the official code" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        import_release.main([*files, "--export"])


# ------------------------------------------------------------------------------------- the files
def imported(folder, *flags, source="in.pth", out="out.safetensors"):
    return import_release.main([str(folder / source), str(folder / out), *flags])


def test_the_average_is_exported_where_it_is_asked_for(tmp_path):
    plain, _ = official_file(tmp_path / "in.pth")
    assert imported(tmp_path) == 0
    model = from_release(plain)
    states = {
        "model": model.state_dict(),
        "ema": {key: value + 1 for key, value in model.state_dict().items()},
    }
    metrics = {"model": {"top1": 80.0}, "ema": {"top1": 70.0}}  # the plain ones are better
    torch.save({**states, "metrics": metrics}, tmp_path / "ours.pth")
    words = ("--export", "--cfg", str(tmp_path / "out.yaml"))
    for flags, name in (([], "model"), (["--ema"], "ema")):
        assert imported(tmp_path, *words, *flags, source="ours.pth", out="back.pth") == 0
        back = from_release(torch.load(tmp_path / "back.pth", weights_only=True)["model"])
        assert all(torch.equal(v, states[name][key]) for key, v in back.state_dict().items())


def lightning(state):
    state = {f"net._orig_mod.{key}": value for key, value in state.items()}
    return {"state_dict": {**state, "loss.weight": torch.ones(7)}, "hyper_parameters": {}}


WRAPPED = {
    "module": lambda s: {"model": {f"module.{key}": value for key, value in s.items()}},
    "compiled": lambda s: {f"_orig_mod.module.{key}": value for key, value in s.items()},
    "Lightning": lightning,
    "mmengine": lambda s: {
        "meta": {},
        "message_hub": {},
        "state_dict": {f"backbone.{key}": value for key, value in s.items()},
    },
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", WRAPPED)
def test_M2_wrappers_and_layouts_of_others_are_imported(tmp_path, capsys, case, legacy):
    plain = official_state(**SMALL)
    payload = {**WRAPPED[case](plain), "config": CfgNode({"A": 1})}
    torch.save(payload, tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
    assert imported(tmp_path) == 0
    wanted = from_release(plain).state_dict()
    found = read(tmp_path / "out.safetensors")["model"]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    assert ("left out: loss.weight" in capsys.readouterr().err) == (case == "Lightning")


def test_W2_class_names_go_in_and_out(tmp_path):
    names = [f"class {i}" for i in range(7)]
    official_file(tmp_path / "in.pth", classes=names)
    assert imported(tmp_path) == 0
    assert read(tmp_path / "out.safetensors")["classes"] == names
    words = ("--export", "--cfg", str(tmp_path / "out.yaml"))
    assert imported(tmp_path, *words, source="out.safetensors", out="back.pth") == 0
    assert torch.load(tmp_path / "back.pth", weights_only=True)["classes"] == names
    official_file(tmp_path / "in.pth", classes=names[:3])
    assert imported(tmp_path) == 2


def folder_there(folder):
    (folder / "out.safetensors").mkdir()


def yaml_there(folder):
    (folder / "out.yaml").write_text("MODEL: {NAME: mine}\n")


def yaml_folder(folder):
    (folder / "out.yaml").mkdir()


UNWRITABLE = {
    "folder": (folder_there, {}, "there is a folder of this name"),
    "yaml folder": (yaml_folder, {}, "there is a folder of this name"),
    "full for the yaml": (lambda f: fill_up(f / "out.yaml"), {}, "out.yaml.*No space left"),
    "no folder": (lambda _: None, {"out": "none/out.safetensors"}, "cannot write .*No such file"),
    "a configuration of mine": (yaml_there, {}, "out.yaml would be written too, and is there"),
    "itself": (lambda _: None, {"source": "out.safetensors"}, "no such checkpoint"),
}


def test_C10_tensors_that_find_no_room_leave_nothing(tmp_path, capsys):
    official_file(tmp_path / "in.pth")
    with files_of_at_most(5000):
        assert imported(tmp_path) == 2
    assert re.match("error: cannot write .*out.safetensors", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


@pytest.mark.parametrize("case", UNWRITABLE)
def test_C10_what_cannot_be_written_is_named(tmp_path, capsys, case):
    spoil, words, message = UNWRITABLE[case]
    official_file(tmp_path / "in.pth")
    spoil(tmp_path)
    assert imported(tmp_path, **words) == 2
    assert re.match(f"error: .*{message}", capsys.readouterr().err)
    if case == "a configuration of mine":
        assert not (tmp_path / "out.safetensors").exists()
        assert "mine" in (tmp_path / "out.yaml").read_text()


def test_an_import_does_not_write_over_its_source(tmp_path, capsys):
    official_file(tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    assert imported(tmp_path, source="w.safetensors", out="w.safetensors") == 2
    assert "another file than IN" in capsys.readouterr().err
    assert (tmp_path / "w.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["ours", "nan", "quantised"])
def test_M3_other_tensors_are_not_imported(tmp_path, capsys, name):
    state = official_state(**SMALL)
    key = "classifier.head.weight"
    if name == "ours":
        state, words = from_release(state).state_dict(), "expected model weights, named layers"
    elif name == "nan":
        state[key] = state[key] * float("nan")
        words = f"NaN or infinite values: {key}"
    else:
        state[key], words = state[key].to(torch.int8), f"{key} (int8)"
    torch.save({"model": state}, tmp_path / "in.pth")
    assert imported(tmp_path) == 2
    assert words in capsys.readouterr().err
