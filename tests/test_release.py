"""Official checkpoints: in and out bit for bit, and the same function as the released code's."""

import pytest
import torch

from quadmamba.models import QuadMamba, ReleaseError, from_release, to_release
from quadmamba.models.release import official_name
from tests.literal import literal_logits, official_state

SMALL = {"dims": (16, 24, 32, 40), "depths": (2, 4, 1, 1), "quad": (True, True, False, False)}
SMALL |= {"ratio": 1.5, "n": 1, "mlp_ratio": 2.5, "classes": 7}
ARCHITECTURES = {
    "quadmamba": SMALL,
    "vmamba": SMALL | {"quad": (False,) * 4, "ratio": 2.0, "mlp_ratio": 4.0},
    "states": SMALL | {"n": 3, "depths": (1, 1, 2, 1), "quad": (False, True, True, False)},
    "odd ratio": SMALL | {"dims": (20, 40, 60, 120), "ratio": 1.15, "mlp_ratio": 8 / 3},
}


def small(**changes):
    return official_state(**(SMALL | changes))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_go_in_and_out_bit_for_bit(name):
    state = official_state(**ARCHITECTURES[name])
    model = from_release(state)
    assert model.num_classes == 7
    assert [len(stage) for stage in model.stages] == list(ARCHITECTURES[name]["depths"])
    back = to_release(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert all(back[key].dtype == value.dtype for key, value in state.items())
    assert {p.decay for p in model.parameters()} == {"decay", "no_decay", "ssm"}, "still tagged"


def test_every_tensor_has_a_value_of_its_own():
    """Two tensors of one shape that change places would pass a mere comparison of shapes."""
    state = {key: torch.full_like(v, i) for i, (key, v) in enumerate(small().items())}
    model = from_release(state)
    own = dict(model.named_parameters())
    first = own["stages.0.0.op.ssm.dt_bias"]
    assert first.unique().item() == list(state).index("layers.0.blocks.0.op.dt_projs_bias")
    assert own["downsamples.2.1.bias"].unique().item() == list(state).index(
        "layers.2.downsample.3.bias"
    )
    assert own["stages.1.3.op.predictor.score.2.weight"].unique().item() == list(state).index(
        "layers.1.blocks.3.op.score_predictor.out_conv.2.weight"
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=str)
@pytest.mark.parametrize("name", ["quadmamba", "vmamba"])
def test_logits_and_gradients_equal_the_literal_restatement(name, size, training):
    state = {key: v.double() for key, v in official_state(**ARCHITECTURES[name]).items()}
    model = from_release(state).train(training)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.randn(2, 7, generator=torch.Generator().manual_seed(2)).double()
    leaves = {key: v.requires_grad_() for key, v in state.items()}
    results = []
    for forward in (lambda: model(images), lambda: literal_logits(leaves, images, training)):
        torch.manual_seed(3)  # the same Gumbel noise
        logits = forward()
        (logits * weights).sum().backward()
        results.append(logits.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    own = {official_name(key): p.grad for key, p in model.named_parameters()}
    for key, leaf in leaves.items():
        assert (own[key] is None) == (leaf.grad is None) == ("predictor" in key and not training)
        if leaf.grad is not None:
            assert leaf.grad.abs().sum() > 0, key
            ours = own[key].reshape(leaf.shape)
            torch.testing.assert_close(ours, leaf.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_older_spellings_of_vmamba_are_read():
    state = small(quad=(False,) * 4)
    old = {
        key.replace(".op.", ".self_attention.")
        .replace("0.norm.", "0.ln_1.")
        .replace("1.norm.", "1.ln_1.")
        .replace("2.norm.", "2.ln_1.")
        .replace("3.norm.", "3.ln_1.")
        .replace("classifier.", ""): v[..., None, None] if "fc1.weight" in key else v
        for key, v in state.items()
    }
    assert sum(key.endswith("ln_1.weight") for key in old) == 8
    assert {"norm.weight", "head.bias"} < set(old)
    back = to_release(from_release(old))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    with pytest.raises(ReleaseError, match=r"classifier\.head\.bias under two spellings"):
        from_release(state | {"head.bias": state["classifier.head.bias"]})


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


BAD = {
    "missing": (
        lambda s: without(s, "layers.1.blocks.2.op.Ds", "patch_embed.5.bias"),
        r"(?s)got \d+:.*2 missing: patch_embed\.5\.bias, layers\.1\.blocks\.2\.op\.Ds",
    ),
    "unexpected": (
        lambda s: s | {"layers.0.blocks.0.op.conv2d.bias": torch.zeros(24)},
        r"1 unexpected: layers\.0\.blocks\.0\.op\.conv2d\.bias",
    ),
    "shape": (
        lambda s: s | {"layers.0.blocks.1.op.Ds": torch.zeros(96)},
        r"1 of another shape: layers\.0\.blocks\.1\.op\.Ds \(96,\) for \(48,\)",
    ),
    "gated": (
        lambda s: s | {"layers.3.blocks.0.op.in_proj.weight": torch.zeros(120, 40)},
        r"op\.in_proj\.weight \(120, 40\) for \(60, 40\)",
    ),
    "no predictor in one block": (
        lambda s: {k: v for k, v in s.items() if "1.blocks.1.op.score" not in k},
        r"10 missing: layers\.1\.blocks\.1\.op\.score_predictor",
    ),
    "no stage": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("layers.3")},
        r"expected layers\.i\.blocks\.j with 4 stages .*got \[2, 4, 1, 0\] blocks",
    ),
    "a hole": (
        lambda s: {k: v for k, v in s.items() if "layers.1.blocks.2." not in k},
        r"blocks j = 0, 1, \.\.\., got \[2, 3, 1, 1\]",
    ),
    "no head": (
        lambda s: without(s, "classifier.head.weight"),
        r"expected a tensor classifier\.head\.weight, which tells the architecture, got none",
    ),
    "ratio": (
        lambda s: s | {"layers.2.blocks.0.mlp.fc1.weight": torch.zeros(81, 32)},
        r"expected one ratio of hidden channels in all stages, got \[40, 60, 81, 100\]",
    ),
    "mixed types": (
        lambda s: s | {"classifier.head.bias": torch.zeros(7).half()},
        r"expected tensors of one floating type, got \['torch\.float16', 'torch\.float32'\]",
    ),
    "ours": (
        lambda s: from_release(s).state_dict(),
        r"got \[0, 0, 0, 0\] blocks in stages 0 to 3, and keys such as stem\.0\.weight",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_official_checkpoint_is_an_error_with_a_list(case):
    change, message = BAD[case]
    with pytest.raises(ReleaseError, match=message):
        from_release(change(small()))


def test_the_list_has_a_line_for_each_kind_of_fault():
    state = without(small(), "classifier.norm.bias") | {"extra": torch.zeros(1)}
    with pytest.raises(ReleaseError) as caught:
        from_release(state)
    assert str(caught.value).split("\n") == [
        f"expected the {len(state)} tensors of an official checkpoint, got {len(state)}:",
        "  1 missing: classifier.norm.bias",
        "  1 unexpected: extra",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": ("quadtree",) * 4}, r"stages\.0\.0: expected a scan of the official code"),
        ({"orders": ("window",) * 4}, r"got order=WindowOrder"),
        ({"shift": False}, r"stages\.0\.1: .*shift \(1, 1\), got .*sign=None"),
        ({"selection": "first"}, r"a predictor .*selection=first"),
        ({"partition": (4, 8)}, r"partition \(2, 4\).* got order=ReleaseOrder\(partition=\(4, 8\)"),
    ],
)
def test_what_the_official_code_cannot_run_is_not_written(change, message):
    kwargs = {"orders": ("release", "release", "raster", "raster"), **change}
    model = QuadMamba((8, 8, 8, 8), depths=(2, 2, 1, 1), num_classes=3, **kwargs)
    with pytest.raises(ReleaseError, match=message):
        to_release(model)


def test_half_precision_stays_half_precision():
    state = {key: v.half() for key, v in small().items()}
    assert all(p.dtype == torch.float16 for p in from_release(state).parameters())
