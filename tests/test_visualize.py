"""Pictures of scores and partitions: the window of each token, and what ends up in the picture."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import fill_up
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from quadmamba.models import QuadMamba
from quadmamba.models.orders import SHIFT_SIGNS, QuadtreeOrder, ReleaseOrder
from quadmamba.models.ss2d import QuadSS2D
from quadmamba.tools import visualize as tool
from quadmamba.utils.views import block_views, quad_blocks, window_map
from quadmamba.utils.visualize import GAP, partition_images

CONFIG = """
MODEL: {NAME: tiny, DIMS: [8, 8, 8, 8], DEPTHS: [2, 1, 1, 1], SSM_RATIO: 1.0, ORDERS: %s}
DATA: {IMG_SIZE: 64}
DEVICE: cpu
"""


def build(orders=("quadtree", "quadtree", "raster", "raster"), num_classes=10):
    torch.manual_seed(0)
    return QuadMamba(
        [8] * 4, depths=[2, 1, 1, 1], orders=orders, ssm_ratio=1.0, num_classes=num_classes
    )


def mixer(order, sign=None):
    return QuadSS2D(4, order=order, ssm_ratio=1.0, sign=sign).eval()


def scores_for(op, h, w, chosen):
    """Scores (1, h, w) that make `op` choose this quadrant."""
    pool = op.order.maps(h, w, op.shift(h, w), torch.device("cpu")).pool
    return (pool == chosen).float().view(1, h, w)


def windows(op, h, w, chosen):
    """Windows (h, w) where `op` selects this quadrant, and whether each token is in it."""
    decision = torch.eye(4)[[chosen]]
    return (grid[0] for grid in window_map(op, decision, h, w))


# -------------------------------------------------------------------------------------- windows
def test_windows_of_a_shifted_grid():
    op = mixer(QuadtreeOrder(), sign=(1, -1))  # an 8x8 grid rolls one row down, one column left
    got, _ = windows(op, 8, 8, 1)
    assert got.tolist() == [
        [5, 0, 0, 0, 0, 4, 4, 5],
        [7, 0, 0, 0, 0, 6, 6, 7],
        [7, 0, 0, 0, 0, 6, 6, 7],
        [3, 2, 2, 2, 2, 3, 3, 3],
        [3, 2, 2, 2, 2, 3, 3, 3],
        [3, 2, 2, 2, 2, 3, 3, 3],
        [3, 2, 2, 2, 2, 3, 3, 3],
        [5, 0, 0, 0, 0, 4, 4, 5],
    ]


@pytest.mark.parametrize("sign", [None, *SHIFT_SIGNS])
@pytest.mark.parametrize(("h", "w"), [(2, 2), (5, 7), (13, 13), (14, 14), (20, 36), (33, 17)])
def test_windows_follow_one_another_in_the_sequence(h, w, sign):
    op = mixer(QuadtreeOrder(), sign)
    maps = op.order.maps(h, w, op.shift(h, w), torch.device("cpu"))
    for chosen in range(4):
        window, selected = (grid.flatten() for grid in windows(op, h, w, chosen))
        assert torch.equal(selected, maps.quadrant == chosen)
        assert torch.equal(window >= 4, selected)
        assert torch.equal(window[window < 4], maps.quadrant[maps.quadrant != chosen].long())
        runs = torch.unique_consecutive(window[maps.tables[chosen].long()])
        assert len(runs) == len(window.unique()), "each window is one run of the sequence"
        if min(h, w) >= 4:
            assert len(runs) == 7


def test_the_release_selects_where_its_own_maps_say():
    op = mixer(ReleaseOrder(), sign=(1, 1))
    maps = op.order.maps(16, 24, op.shift(16, 24), torch.device("cpu"))
    for chosen in range(4):
        window, selected = windows(op, 16, 24, chosen)
        assert torch.equal(selected.flatten(), maps.quadrant == chosen)
        assert window.unique().numel() == 7


# ----------------------------------------------------------------------------------------- views
def test_views_hold_the_scores_and_leave_the_model_as_it_was():
    model = build().train()
    model.stages[0].eval()
    modes = [module.training for module in model.modules()]
    images, before = torch.randn(2, 3, 64, 48), torch.get_rng_state()
    views = block_views(model, images)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before), "no noise is drawn"
    assert not any(module._forward_hooks for module in model.modules())
    names = ["stage 1 block 1", "stage 1 block 2, shifted", "stage 2 block 1"]
    assert [view.name for view in views] == names == list(quad_blocks(model))
    assert [tuple(view.score.shape) for view in views] == [(2, 16, 12)] * 2 + [(2, 8, 6)]
    again = block_views(model.eval(), images)
    assert all(torch.equal(a.score, b.score) for a, b in zip(views, again))
    with torch.no_grad():
        op, block = model.stages[0][0].op, model.stages[0][0]
        x = op.conv(op.in_proj(block.norm(model.stem(images), None)[1]))
        assert torch.equal(views[0].score, op.predictor(x))
    assert views[0].score.std() > 0


def test_modes_and_hooks_are_restored_after_an_error():
    model = build().train()
    with pytest.raises(ValueError, match="expected images"):
        block_views(model, torch.randn(1, 4, 32, 32))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


# -------------------------------------------------------------------------------------- pictures
def grey(size):
    """Light grey normalised images (1, 3, size, size)."""
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return ((torch.ones(1, 3, size, size) * 0.8 - mean) / std).float()


def test_a_picture_shows_image_scores_and_partition():
    model = build()
    ops = quad_blocks(model)
    chosen = dict(zip(ops, (3, 0, 1)))
    for name, op in ops.items():
        op.predictor.forward = lambda x, op=op, q=chosen[name]: scores_for(op, *x.shape[1:3], q)
    side = 160
    picture = partition_images(model, grey(side))
    panel = side + 2 * GAP
    assert picture.shape == (1, 3, 2 * panel, 4 * panel)
    assert picture.min() >= 0
    assert picture.max() <= 1

    def at(row, column, y, x):
        return picture[0, :, row * panel + GAP + y, column * panel + GAP + x]

    image = torch.full((3,), 0.8)
    for row in range(2):
        torch.testing.assert_close(at(row, 0, 50, 70), image)
    torch.testing.assert_close(at(1, 1, 100, 100), image)  # inside the selected quadrant 3
    for y, x in ((40, 40), (40, 120), (120, 40)):
        torch.testing.assert_close(at(1, 1, y, x), 0.45 * image)
    assert at(1, 1, 30, 80).tolist() == [1, 1, 1], "white between quadrants"
    torch.testing.assert_close(at(1, 1, 120, 100), torch.tensor([1, 0.85, 0]))  # sub-windows
    torch.testing.assert_close(at(1, 1, 40, 20), 0.45 * image)  # none in the others
    assert at(0, 1, 120, 120).mean() > at(0, 1, 40, 40).mean() + 0.2, "high scores are light"
    assert at(1, 3, 80, 130).tolist() == [1, 1, 1], "white around the selected quadrant"
    # Block 2 rolls 40 tokens by 5: quadrant 0 starts at token 35 and wraps around to token 15.
    for y, x in ((150, 150), (150, 10), (10, 150), (10, 10)):
        torch.testing.assert_close(at(1, 2, y, x), image)
    torch.testing.assert_close(at(1, 2, 100, 100), 0.45 * image)


def test_small_and_long_images_are_drawn():
    assert partition_images(build(), grey(32)).shape == (1, 3, 2 * 168, 4 * 168)
    assert partition_images(build(), torch.randn(2, 3, 33, 80)).shape[0] == 2


@pytest.mark.parametrize("score", [0.0, float("nan"), float("-inf")])
def test_constant_and_broken_scores_are_drawn(score):
    model = build()
    for op in quad_blocks(model).values():
        op.predictor.forward = lambda x: torch.full(x.shape[:3], score)
    picture = partition_images(model, grey(160))
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_a_model_without_quad_blocks_gives_the_images():
    picture = partition_images(build(["raster"] * 4), grey(160))
    torch.testing.assert_close(picture, torch.full((1, 3, 160, 160), 0.8))


# ------------------------------------------------------------------------------------------ tool
@pytest.fixture
def inputs(tmp_path):
    """An image, a configuration and weights whose head has another size than the default."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    (tmp_path / "tiny.yaml").write_text(CONFIG % "[quadtree, quadtree, raster, raster]")
    torch.save(build().state_dict(), tmp_path / "tiny.pth")
    return tmp_path


def command(folder, image="noise.png", cfg="tiny.yaml", weights="tiny.pth", output="out"):
    options = ["--cfg", folder / cfg, "--pretrained", folder / weights, "--output", folder / output]
    return [str(word) for word in (folder / image, folder / image, *options)]


def test_the_tool_writes_a_picture_for_each_image(inputs, capsys):
    assert tool.main(command(inputs)) == 0
    files = sorted((inputs / "out").iterdir())
    assert [path.name for path in files] == ["01_noise.png", "02_noise.png"]
    assert all(str(path) in capsys.readouterr().out for path in files[:1])
    picture = np.asarray(Image.open(files[0]))
    panel = 64 * 3 + 2 * GAP  # 64 pixels enlarged to at least 160
    assert picture.shape == (16 + 2 * panel, 4 * panel, 3)
    for column in range(4):
        assert picture[:16, column * panel : (column + 1) * panel].max() > 200, "a caption"
    assert files[0].read_bytes() == files[1].read_bytes()


BAD_INPUT = {
    "cfg": ({"cfg": "none.yaml"}, "no such file"),
    "image": ({"image": "none.png"}, r"cannot read the image .*none\.png"),
    "weights": ({"weights": "none.pth"}, "no such checkpoint"),
    "output": ({"output": "noise.png"}, "--output: cannot write to"),
    "raster": ({"cfg": "raster.yaml"}, "expected a quadtree or release stage"),
    "C10 folder of the picture's name": ({"output": "taken"}, "cannot write .*there is a folder"),
    "C10 device of the picture's name": ({"output": "device"}, "cannot write .*no regular file"),
    "C10 full disk": ({"output": "full"}, "cannot write .*02_noise.png.*No space left"),
    "C10 file above": ({"output": "noise.png/x"}, "--output: cannot write to"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_wrong_input_ends_with_a_message(inputs, capsys, case):
    (inputs / "raster.yaml").write_text(CONFIG % "[raster, raster, raster, raster]")
    (inputs / "taken" / "01_noise.png").mkdir(parents=True)
    (inputs / "device").mkdir()
    (inputs / "device" / "01_noise.png").symlink_to("/dev/full")
    (inputs / "full").mkdir()
    fill_up(inputs / "full" / "02_noise.png")
    change, message = BAD_INPUT[case]
    assert tool.main(command(inputs, **change)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("error: ")


def test_C10_a_picture_that_cannot_be_written_leaves_the_one_before(inputs, capsys):
    assert tool.main(command(inputs)) == 0
    path = inputs / "out" / "01_noise.png"
    before = path.read_bytes()
    fill_up(path)
    assert tool.main(command(inputs, weights="tiny.pth")) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == before
