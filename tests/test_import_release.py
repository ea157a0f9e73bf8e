"""tools/import_release.py: official files in and out, and no code of a file is run."""

import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch
import yaml
from yacs.config import CfgNode

from quadmamba.configs import load_cfg
from quadmamba.models import build_model, from_release
from quadmamba.tools import import_release
from quadmamba.utils.checkpoint import load_pretrained
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
