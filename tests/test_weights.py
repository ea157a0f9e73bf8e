"""Weights in the layouts of other projects: where they are, heads that lack, types of numbers."""

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from quadmamba.utils.checkpoint import load_pretrained
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.weights import Parts, find_weights


class Net(nn.Module):
    """A stem, a stage and a head under the names of the models."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(4, 4)
        self.stages = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Module()
        self.head.norm = nn.LayerNorm(4)
        nn.init.normal_(self.head.norm.weight)
        self.head.fc = nn.Linear(4, classes)


PLAIN, AVERAGE = Net(seed=1).state_dict(), Net(seed=2).state_dict()
BODY = {key: value for key, value in PLAIN.items() if not key.startswith("head.")}
HEAD = {key: value for key, value in PLAIN.items() if key.startswith("head.")}


def under(prefix, state=PLAIN):
    return {f"{prefix}.{key}": value for key, value in state.items()}


def load(path, payload, *, net=None, adapt=False, **more):
    net = net or Net()
    if payload is not None:
        torch.save(payload, path)
    return net, load_pretrained(net, path, adapt_head=adapt, **more)


def equal(net, state):
    return all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def refusal(tmp_path, payload, **more):
    net = more.pop("net", Net())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "w.pth", payload, net=net, **more)
    assert equal(net, before), "nothing is loaded"
    return str(caught.value)


# ----------------------------------------------------------------------------------- wrappers
OTHER = {"neck.weight": torch.zeros(2), "bbox_head.cls.weight": torch.zeros(3, 2)}
ONE = {
    "module": under("module"),
    "orig_mod": under("_orig_mod"),
    "both": under("module._orig_mod"),
    "both, other order": under("_orig_mod.module"),
    "three times": under("module.module._orig_mod.module"),
    "FSDP": under("_fsdp_wrapped_module._orig_mod"),
    "compiled blocks": {
        key.replace("stages.0", "stages.0._orig_mod"): v for key, v in PLAIN.items()
    },
    "model": under("model"),
    "net in Lightning": {"state_dict": under("net._orig_mod"), "pytorch-lightning_version": "2.1"},
    "Lightning": {
        "state_dict": {
            **under("model"),
            "loss.weight": torch.ones(3),
            "accuracy.total": torch.ones(()),
        },
        "pytorch-lightning_version": "2.1",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "mmengine": {"meta": {"epoch": 1}, "state_dict": under("module"), "message_hub": {}},
    "backbone, head apart": {"state_dict": {**under("backbone", BODY), **HEAD}},
    "backbone with its head": {"state_dict": {**under("module.backbone"), **OTHER}},
    "model.backbone": {**under("model.backbone", BODY), **under("model", HEAD)},
    "dicts apart": {"backbone": BODY, "head": {key[5:]: value for key, value in HEAD.items()}},
    "timm": {"state_dict": PLAIN, "arch": "x", "optimizer": {"state": {}}},
    "DeepSpeed": {"module": PLAIN, "ds_version": "1"},
    "tutorial": {"model_state_dict": under("module"), "optimizer_state_dict": {}, "loss": 1.0},
    "nested": {"checkpoint": {"weights": under("_orig_mod")}},
    "parameters": {key: nn.Parameter(value) for key, value in PLAIN.items()},
    "AveragedModel": AveragedModel(Net(seed=1)).state_dict(),
    "FLOP counter": {**PLAIN, "total_ops": torch.ones(1), "stem.total_params": torch.ones(1)},
    "optimizer by name": {"model": PLAIN, "optimizer": {"state": {"stem.weight": PLAIN}}},
    "own name": under("my_classifier.encoder"),
    "a decoder with stages": {**under("backbone"), "decoder.stages.0.weight": torch.ones(2)},
}


@pytest.mark.parametrize("case", ONE)
def test_M2_one_set_of_weights_is_found_wherever_it_is(tmp_path, case):
    net, report = load(tmp_path / "w.pth", ONE[case])
    assert equal(net, PLAIN)
    assert (report.source, report.loaded, report.adapted) == ("model", 8, ())


def test_M2_wrappers_as_pytorch_writes_them(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        wrapped = torch.compile(DistributedDataParallel(torch.compile(Net(seed=1))))
        keys = list(wrapped.state_dict())
        net, _ = load(tmp_path / "w.pth", wrapped.state_dict())
    finally:
        torch.distributed.destroy_process_group()
    assert keys[0] == "_orig_mod.module._orig_mod.stem.weight"
    assert equal(net, PLAIN)


def test_M2_plain_safetensors_of_other_hubs(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(under("module.model"), path, {"format": "pt"})
    net, report = load(path, None)
    assert equal(net, PLAIN)
    assert "found under model.model" in str(report)


def test_M2_what_was_left_out_beside_is_said(tmp_path):
    _, report = load(tmp_path / "w.pth", ONE["backbone with its head"])
    assert "2 tensors beside them left out: neck.weight, bbox_head.cls.weight" in str(report)
    assert "found under state_dict.backbone" in str(report)
    _, report = load(tmp_path / "w.pth", ONE["module"])
    assert "left out" not in str(report)


TWO = {
    "ours": {"model": PLAIN, "ema": AVERAGE},
    "DeiT": {"model": PLAIN, "model_ema": AVERAGE},
    "timm": {"state_dict": PLAIN, "state_dict_ema": under("module", AVERAGE)},
    "Lightning": {"state_dict": {**under("model"), **under("ema_model.module", AVERAGE)}},
    "DINO": {"student": under("module.backbone"), "teacher": under("backbone", AVERAGE)},
    "mmengine swaps them": {
        "message_hub": {},
        "state_dict": AVERAGE,
        "ema_state_dict": {**under("module"), "steps": torch.ones(1)},
    },
}


@pytest.mark.parametrize("weights", ["auto", "ema", "model"])
@pytest.mark.parametrize("case", TWO)
def test_M2_of_weights_and_their_average_the_average_is_taken_unless_named(tmp_path, case, weights):
    net, report = load(tmp_path / "w.pth", TWO[case], weights=weights)
    assert report.source == ("model" if weights == "model" else "ema")
    assert equal(net, PLAIN if weights == "model" else AVERAGE)


@pytest.mark.parametrize("metrics", [3, {"model": 1, "ema": 2}, {"model": {}, "ema": {}}, None])
def test_metrics_of_another_project_decide_nothing(tmp_path, metrics):
    _, report = load(tmp_path / "w.pth", {"model": PLAIN, "ema": AVERAGE, "metrics": metrics})
    assert report.source == "ema"


AMBIGUOUS = {
    "two of a kind": (
        {"model": PLAIN, "state_dict": AVERAGE},
        "2 sets of weights: model, state_dict",
    ),
    "two prefixes": ({**under("a"), **under("b")}, "2 sets of weights: a, b"),
    "two averages": ({"ema": PLAIN, "teacher": AVERAGE}, "2 sets of weights: ema, teacher"),
    "with and without": ({**under("module"), **PLAIN}, "stem.weight under two names"),
    "half a wrapper and another": (
        {**under("module", BODY), **under("_orig_mod", PLAIN)},
        "stem.weight under two names",
    ),
    "halves": (
        {"stem.weight": PLAIN["stem.weight"], **under("x", {"stages.0.bias": torch.ones(4)})},
        "2 sets of weights: (no prefix), x",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_M2_what_is_ambiguous_is_refused(tmp_path, case):
    payload, words = AMBIGUOUS[case]
    assert words in refusal(tmp_path, payload)


def test_tensors_under_the_same_prefix_that_the_model_lacks_are_an_error(tmp_path):
    more = {"model.stages.1.weight": torch.ones(1), "model.extra": torch.ones(1)}
    assert "2 unexpected: stages.1.weight, extra" in refusal(tmp_path, {**under("model"), **more})
    bare = {**PLAIN, "neck.weight": torch.ones(1)}
    assert "1 unexpected: neck.weight" in refusal(tmp_path, bare, adapt=True)


def test_a_model_of_other_names_is_shown_what_was_expected(tmp_path):
    message = refusal(tmp_path, {"conv1.weight": torch.ones(1), "bn1.weight": torch.ones(1)})
    assert "named stages.*, stem.*" in message
    assert "conv1.weight, bn1.weight" in message
    official = {"patch_embed.0.weight": torch.ones(1), "layers.0.blocks.0.op.Ds": torch.ones(1)}
    assert "python -m quadmamba.tools.import_release" in refusal(tmp_path, {"model": official})
    assert "no tensor" in refusal(tmp_path, {"model": {"a": 1}})


def test_a_pickled_model_in_a_dict_is_named(tmp_path):
    assert "torch.save(model.state_dict(), PATH)" in refusal(tmp_path, {"model": Net()})


def test_a_dict_that_holds_itself_ends():
    loop: dict = {"model": PLAIN}
    loop["self"] = loop
    with pytest.raises(CheckpointError, match="sets of weights"):
        find_weights(loop, Parts.of(Net()), "here")


# --------------------------------------------------------------------------------------- head
@pytest.mark.parametrize("norm", [False, True], ids=["no head", "no classifier"])
def test_M3_weights_without_a_head_get_a_fresh_one_and_it_is_said(tmp_path, norm):
    state = {key: v for key, v in PLAIN.items() if key in BODY or (norm and "norm" in key)}
    net = Net()
    fresh = {key: value.clone() for key, value in net.state_dict().items()}
    net, report = load(tmp_path / "w.pth", {"model": state}, net=net, adapt=True)
    assert "new head with fresh values, the file has none" in str(report)
    assert len(report.adapted) == (2 if norm else 4)
    assert equal(net, {**fresh, **state})
    message = refusal(tmp_path, {"model": state})
    assert "expected weights with a classifier (head.fc.weight)" in message
    assert "--pretrained" in message


def test_M3_an_average_without_a_head_does_not_take_that_of_other_weights(tmp_path):
    payload = {**PLAIN, "ema": {key: AVERAGE[key] for key in BODY}}
    assert "expected weights with a classifier" in refusal(tmp_path, payload)
    net, _ = load(tmp_path / "w.pth", payload, weights="model")
    assert equal(net, PLAIN)


def test_M3_a_head_of_another_kind_is_replaced(tmp_path):
    state = {**BODY, "head.mlp.0.weight": torch.ones(2, 4)}
    net, report = load(tmp_path / "w.pth", state, adapt=True)
    assert report.loaded == len(BODY)
    assert torch.equal(net.stem.weight, PLAIN["stem.weight"])


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["stem.bias"], "1 missing: stem.bias"),
        (["stem.bias", *HEAD], "1 missing: stem.bias"),
        (["head.norm.weight"], "1 missing: head.norm.weight"),
        (["head.norm.weight", "head.norm.bias"], "2 missing: head.norm.weight, head.norm.bias"),
        (["head.fc.bias"], "1 missing: head.fc.bias"),
        (["head.fc.weight", "head.fc.bias", "head.norm.bias"], "1 missing: head.norm.bias"),
    ],
)
def test_M3_what_lacks_beside_the_head_or_in_part_of_it_is_an_error(tmp_path, lost, words):
    state = {key: value for key, value in PLAIN.items() if key not in lost}
    assert words in refusal(tmp_path, state, adapt=True)


def test_M3_a_head_of_another_size_starts_anew_as_a_whole(tmp_path):
    state = {**PLAIN, "head.fc.weight": torch.ones(7, 4), "head.fc.bias": torch.ones(7)}
    net = Net()
    fresh = net.head.fc.weight.clone(), net.head.fc.bias.clone()
    net, report = load(tmp_path / "w.pth", state, net=net, adapt=True)
    assert "new head with fresh values, its shape differs: head.fc.weight (7, 4) for (3, 4)" in str(
        report
    )
    assert torch.equal(net.head.fc.weight, fresh[0])
    assert torch.equal(net.head.fc.bias, fresh[1])
    assert torch.equal(net.head.norm.weight, PLAIN["head.norm.weight"])
    assert "head.fc.weight (7, 4) for (3, 4)" in refusal(tmp_path, state)


# -------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_M3_other_floating_types_become_those_of_the_model(tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in PLAIN.items()}
    net, _ = load(tmp_path / "w.pth", state)
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    assert equal(net, {key: value.float() for key, value in state.items()})


def test_M3_other_strides_hold_the_same_numbers(tmp_path):
    state = {key: v.T.contiguous().T if v.dim() > 1 else v[::1] for key, v in PLAIN.items()}
    net, _ = load(tmp_path / "w.pth", state)
    assert equal(net, PLAIN)


STRANGE = {
    "sparse_coo": lambda w: w.to_sparse(),
    "sparse_csr": lambda w: w.to_sparse_csr(),
    "qint8": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "int8": lambda w: w.to(torch.int8),
    "float8_e4m3fn": lambda w: w.to(torch.float8_e4m3fn),
    "complex64": lambda w: w.to(torch.complex64),
    "bool": lambda w: w > 0,
    "without values": lambda w: w.to("meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_M3_tensors_that_are_no_dense_floats_are_refused(tmp_path, kind):
    state = {**PLAIN, "stem.weight": STRANGE[kind](PLAIN["stem.weight"])}
    assert f"stem.weight ({kind})" in refusal(tmp_path, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_M3_weights_of_a_training_that_diverged_are_refused(tmp_path, value):
    broken = PLAIN["stem.weight"].double()
    broken[1, 2] = value
    message = refusal(tmp_path, {"model": {**PLAIN, "stem.weight": broken}})
    assert "1 tensors hold NaN or infinite values: stem.weight" in message
