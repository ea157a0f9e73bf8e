"""A fresh model: widths, initial values, shifts and tags, as the tables of its classes say."""

import pytest
import torch
from torch.nn.functional import softplus

from quadmamba.configs import load_cfg
from quadmamba.models import QuadMamba, build_model, layers, ss2d
from quadmamba.models.ss2d import ScanParameters


def spread(values, low, high):
    """Assert that values fill [low, high] evenly."""
    width = high - low
    assert low <= values.min() < low + 0.01 * width
    assert high - 0.01 * width < values.max() <= high
    assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * width)
    assert values.std().item() == pytest.approx(width / 12**0.5, rel=0.05)


def test_initial_values_of_the_scan():
    torch.manual_seed(0)
    ssm = ScanParameters(2, 512, 4, 8)
    spread(ssm.x_proj_weight, -(512**-0.5), 512**-0.5)
    spread(ssm.dt_weight, -(8**-0.5), 8**-0.5)
    spread(softplus(ssm.dt_bias.double()).log10(), -3 - 1e-4, -1 + 1e-4)
    torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1.0, 5).expand(2, 512, 4))
    assert torch.equal(ssm.D, torch.ones(2, 512))
    shapes = {name: tuple(p.shape) for name, p in ssm.named_parameters()}
    assert shapes == {
        "x_proj_weight": (2, 16, 512),
        "dt_weight": (2, 512, 8),
        "dt_bias": (2, 512),
        "A_log": (2, 512, 4),
        "D": (2, 512),
    }


def test_initial_values_of_the_layers():
    """Linear: trunc-normal of 0.02 and 0; convolutions: within 1/sqrt(fan in); norms: 1 and 0."""
    torch.manual_seed(0)
    model = QuadMamba((32, 48, 64, 96), depths=(2, 1, 1, 1), num_classes=100)
    kinds = set()
    for name, module in model.named_modules():
        kinds.add(type(module))
        if isinstance(module, torch.nn.Linear):
            assert module.weight.abs().max() < 0.02 * 6, name
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, torch.nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            spread(module.weight, -bound, bound) if module.weight.numel() > 2000 else None
            assert 0.8 * bound < module.weight.abs().max() <= bound, name
        elif isinstance(module, torch.nn.LayerNorm):
            assert module.weight.eq(1).all(), name
            assert not module.bias.any(), name
            assert module.eps == 1e-5, name
    assert {layers.Linear, layers.DepthwiseSiLU, layers.LayerNorm, torch.nn.Linear} <= kinds


def test_the_parts_of_a_model_have_the_widths_of_their_arguments():
    model = QuadMamba(
        (32, 48, 64, 100),
        depths=(1, 2, 1, 1),
        orders=("quadtree", "window", "raster", "release"),
        num_classes=11,
        in_chans=2,
        ssm_ratio=1.5,
        d_state=3,
        mlp_ratio=2.5,
        window=5,
        partition=(4, 8),
    )
    assert (model.out_channels, model.in_chans, model.num_classes) == ((32, 48, 64, 100), 2, 11)
    assert model.strides == (4, 8, 16, 32)
    assert [len(stage) for stage in model.stages] == [1, 2, 1, 1]
    assert [tuple(p.shape) for p in model.stem.parameters() if p.dim() > 1] == [
        (16, 2, 3, 3),
        (32, 16, 3, 3),
    ]
    for dim, stage in zip((32, 48, 64, 100), model.stages):
        op, mlp = stage[0].op, stage[0].mlp
        assert tuple(op.in_proj.weight.shape) == (int(1.5 * dim), dim)
        assert tuple(op.out_proj.weight.shape) == (dim, int(1.5 * dim))
        assert tuple(op.conv.weight.shape) == (int(1.5 * dim), 1, 3, 3)
        assert tuple(mlp.fc1.weight.shape) == (int(2.5 * dim), dim)
        routes = 2 if isinstance(op, ss2d.QuadSS2D) else 4
        assert tuple(op.ssm.dt_weight.shape) == (routes, int(1.5 * dim), -(-dim // 16))
        assert op.ssm.A_log.shape[-1] == 3
    predictor = model.stages[0][0].op.predictor
    widths = [tuple(layer.weight.shape) for layer in predictor.layers()]
    assert widths == [(48,), (48, 48), (24, 48), (12, 24), (2, 12)]
    orders = [stage[0].op.order for stage in model.stages]
    assert orders[1].window == 5
    assert orders[0].partition == orders[3].partition == (4, 8)
    assert tuple(model.head.fc.weight.shape) == (11, 100)


def test_build_model_hands_every_key_on():
    keys = {
        "DIMS": [8, 16, 24, 32],
        "DEPTHS": [2, 1, 1, 1],
        "ORDERS": ["release", "window", "raster", "release"],
        "SSM_RATIO": 1.5,
        "D_STATE": 2,
        "MLP_RATIO": 3.0,
        "DROP_PATH": 0.3,
        "WINDOW": 5,
        "PARTITION": [1, 8],
        "SELECTION": "random",
        "SHIFT_DIRECTIONS": 1,
        "TAU": 0.4,
        "GUMBEL": False,
        "USE_CHECKPOINT": True,
        "NUM_CLASSES": 9,
    }
    built = build_model(load_cfg(flags={f"MODEL.{key}": value for key, value in keys.items()}))
    made = QuadMamba(**{key.lower(): value for key, value in keys.items()})
    assert str(built) == str(made)
    assert built.use_checkpoint
    assert torch.equal(built.keep, made.keep)
    op = built.stages[0][1].op
    assert (op.sign, op.tau, op.gumbel, op.selection) == ((1, 1), 0.4, False, "random")
    assert (
        build_model(load_cfg(flags={"MODEL.NUM_CLASSES": 9, "MODEL.SHIFT": False}), 4).num_classes
        == 4
    )
    still = build_model(load_cfg(flags={"MODEL.SHIFT": False, "MODEL.DIMS": [8] * 4}))
    assert still.num_classes == 1000
    assert all(block.op.sign is None for stage in still.stages[:2] for block in stage)


def test_the_rate_of_dropped_paths_grows_from_none_to_the_last_block():
    model = QuadMamba((8, 8, 8, 8), depths=(2, 1, 2, 1), drop_path=0.3)
    expected = [1.0, 0.94, 0.88, 0.82, 0.76, 0.7]
    torch.testing.assert_close(model.keep, torch.tensor(expected).view(6, 1, 1))
    assert "keep" not in model.state_dict()
    assert QuadMamba((8, 8, 8, 8), depths=(1, 1, 1, 1)).keep.eq(1).all()


def test_shifted_blocks_take_the_directions_in_turn():
    """Every second block of a stage; the direction goes on with the number of the block."""

    def signs(**kwargs):
        model = QuadMamba((8, 8, 8, 8), depths=(2, 6, 3, 1), orders=("quadtree",) * 4, **kwargs)
        return [[block.op.sign for block in stage] for stage in model.stages]

    assert signs() == [
        [None, (1, 1)],
        [None, (-1, -1), None, (1, -1), None, (-1, 1)],
        [None, (1, 1), None],
        [None],
    ]
    assert signs(shift_directions=2)[1] == [None, (-1, -1), None, (1, 1), None, (-1, -1)]
    assert signs(shift_directions=3)[1] == [None, (-1, -1), None, (1, -1), None, (1, 1)]
    assert signs(shift=False)[1] == [None] * 6
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"shift_directions: expected 1 to 4, got {count}"):
            signs(shift_directions=count)


def test_decay_tags():
    """Matrices and filters decay; biases, norms and D do not; A_log and the bias of delta may."""
    model = QuadMamba((8, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=3)
    tags = {name: p.decay for name, p in model.named_parameters()}
    for name, param in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            expected = "ssm"
        else:
            plain = name.endswith(("bias", ".D")) or "norm" in name or param.dim() == 1
            expected = "no_decay" if plain else "decay"
        assert tags[name] == expected, name
    assert sorted(set(tags.values())) == ["decay", "no_decay", "ssm"]
