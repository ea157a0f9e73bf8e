"""Scan paths and receptive fields: the numbers behind the pictures, and the pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from quadmamba.models import QuadMamba
from quadmamba.tools import visualize as tool
from quadmamba.utils.receptive_field import field_image
from quadmamba.utils.scan_path import path_images
from quadmamba.utils.views import block_views, mixers, quad_blocks, receptive_fields, scan_positions
from quadmamba.utils.visualize import GAP, heat, partition_images


def build(orders=("quadtree", "release", "window", "raster"), **keywords):
    torch.manual_seed(0)
    keywords = {"ssm_ratio": 1.0, "window": 3, "num_classes": 3, **keywords}
    return QuadMamba([8] * 4, depths=[2, 1, 1, 1], orders=orders, **keywords)


def fix_quadrant(op, quadrant):
    """Let `op` select this quadrant whatever the image."""

    def score(x):
        h, w = x.shape[1:3]
        pool = op.order.maps(h, w, op.shift(h, w), torch.device("cpu")).pool
        return (pool == quadrant).float().view(1, h, w).expand(len(x), h, w)

    op.predictor.forward = score


# ------------------------------------------------------------------------------------- positions
def test_positions_are_those_of_the_scan():
    model = build()
    fix_quadrant(quad_blocks(model)["stage 1 block 1"], 1)
    positions = scan_positions(model.train(), torch.randn(2, 3, 32, 32))
    assert model.training
    assert list(positions) == list(mixers(model))
    nested = positions["stage 1 block 1"][0]
    assert nested.tolist() == [  # the example of models/orders.py, token by token
        [0, 1, 2, 3, 16, 17, 20, 21],
        [4, 5, 6, 7, 18, 19, 22, 23],
        [8, 9, 10, 11, 24, 25, 28, 29],
        [12, 13, 14, 15, 26, 27, 30, 31],
        [32, 33, 34, 35, 48, 49, 50, 51],
        [36, 37, 38, 39, 52, 53, 54, 55],
        [40, 41, 42, 43, 56, 57, 58, 59],
        [44, 45, 46, 47, 60, 61, 62, 63],
    ]
    collided = positions["stage 2 block 1"][0].flatten()
    assert len(collided.unique()) == 14, "an eighth of the positions is empty"
    assert positions["stage 3 block 1"][0].tolist() == [[0, 1], [2, 3]]
    assert positions["stage 4 block 1"].shape == (2, 1, 1)
    model = build(orders=("window",) + ("raster",) * 3, window=3)
    position = scan_positions(model, torch.zeros(1, 3, 16, 20))["stage 1 block 1"][0]
    assert position.tolist() == [
        [0, 1, 2, 9, 10],
        [3, 4, 5, 11, 12],
        [6, 7, 8, 13, 14],
        [15, 16, 17, 18, 19],
    ]


# --------------------------------------------------------------------------------------- fields
def test_the_field_of_a_stage_is_where_pixels_matter():
    model = build(orders=("raster",) * 4).eval()
    images = torch.randn(2, 3, 64, 96)
    fields = receptive_fields(model, images)
    assert [tuple(field.shape) for field in fields] == [(64, 96)] * 4
    field = fields[0]
    changed = images.clone()
    changed[:, :, 30:36, 44:52] += 0.1 * torch.randn(2, 3, 6, 8)
    with torch.no_grad():
        centre = [model.forward_features(x)[0][:, :, 8, 12] for x in (images, changed)]
    assert (centre[0] - centre[1]).abs().max() > 1e-4
    assert field[32:34, 48:50].min() > 0, "the centre itself"
    assert field[32, 48] > 10 * field[2, 2], "more than a far corner"
    numeric, eps = 0.0, 1e-2
    for sign in (1, -1):
        moved = images[:1].clone()
        moved[0, 0, 33, 49] += sign * eps
        with torch.no_grad():
            numeric += sign * model.forward_features(moved)[0][0, :, 8, 12].sum() / (2 * eps)
    single = images[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_features(single)[0][0, :, 8, 12].sum(), single)
    assert gradient[0, 0, 33, 49].item() == pytest.approx(numeric.item(), rel=0.05, abs=1e-3)
    torch.testing.assert_close(receptive_fields(model, images[:1])[0], gradient[0].abs().sum(0))
    assert all(p.grad is None for p in model.parameters())


def test_field_pictures_are_light_at_the_centre():
    names, picture = field_image(build(), torch.randn(3, 3, 64, 64))
    assert names == ["mean image", "stage 1", "stage 2", "stage 3", "stage 4"]
    panel = 64 * 3 + 2 * GAP
    assert picture.shape == (1, 3, panel, 5 * panel)
    stage = picture[0, :, :, panel : 2 * panel]
    y, x = GAP + 3 * 34, GAP + 3 * 34
    assert stage[:, y - 9 : y + 9, x - 9 : x + 9].mean() > stage[:, GAP + 5, GAP + 5].mean() + 0.2


def test_heat_runs_from_dark_to_light():
    colours = heat(torch.tensor([[[0.0, 0.5, 1.0]]]))[0, :, 0]  # (3, 3)
    light = colours.mean(0).tolist()
    assert light == sorted(light)
    assert light[2] - light[0] > 0.6


# ---------------------------------------------------------------------------------------- paths
def test_a_path_joins_the_tokens_in_their_order():
    model = build(orders=("raster",) * 4)
    names, picture = path_images(model, torch.zeros(1, 3, 32, 32))
    assert names == [
        "image",
        "stage 1 block 1",
        "stage 2 block 1",
        "stage 3 block 1",
        "stage 4 block 1",
    ], "block 2 of stage 1 scans as block 1"
    side = 32 * 3  # at least 12 pixels a token
    panel = picture[0, :, GAP : GAP + side, side + 3 * GAP : 2 * side + 3 * GAP]
    first, last = panel[:, 6, 12], panel[:, 90, 84]  # between tokens 0, 1 and 62, 63
    assert first[2] > 0.8
    assert last[0] > 0.8
    assert last[2] < 0.4
    middle = panel[:, 12, 6]  # between tokens 0 and 8, which are no neighbours in the scan
    assert middle[2] < 0.6
    torch.testing.assert_close(panel[:, 12, 48], torch.full((3,), 150 / 255), rtol=0, atol=0.01)


def test_the_path_of_each_image_follows_its_quadrant():
    model = build(orders=("quadtree", "raster", "raster", "raster"))
    pictures = []
    for quadrant in (0, 3):
        fix_quadrant(quad_blocks(model)["stage 1 block 1"], quadrant)
        names, picture = path_images(model, torch.zeros(2, 3, 32, 32))
        assert names[1:3] == ["stage 1 block 1", "stage 1 block 2, shifted"]
        assert torch.equal(picture[0], picture[1])
        pictures.append(picture)
    assert not torch.equal(*pictures)


# ------------------------------------------------------------------------- other choices of a block
@pytest.mark.parametrize("keywords", [{"selection": "random"}, {"partition": (4, 8)}])
def test_other_selections_and_partitions_are_drawn(keywords):
    model = build(orders=["quadtree"] * 2 + ["raster"] * 2, **keywords)
    views = block_views(model, torch.randn(2, 3, 64, 64))
    view = views[0]
    assert (view.score is None) == ("selection" in keywords)
    assert view.selected.flatten(1).sum(1).tolist() == [64, 64]
    inside, outside = view.window[view.selected].unique(), view.window[~view.selected].unique()
    if "partition" in keywords:
        assert len(inside) == 16
        assert inside.min() == 16
        assert len(view.window[0][~view.selected[0]].unique()) == 12
        assert outside.max() < 16
    picture = partition_images(model, torch.zeros(1, 3, 64, 64))
    panel = 64 * 3 + 2 * GAP
    lower = picture[0, :, panel:, panel : 2 * panel]
    yellow = ((lower - torch.tensor([1, 0.85, 0]).view(3, 1, 1)).abs().sum(0) < 1e-3).sum()
    assert yellow > 150


# ----------------------------------------------------------------------------------------- tool
@pytest.mark.parametrize(("what", "count"), [("path", 2), ("erf", 1), ("partition", 2)])
def test_the_tool_draws_each_kind_with_random_weights(tmp_path, capsys, what, count):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    (tmp_path / "tiny.yaml").write_text(
        "MODEL: {NAME: tiny, DIMS: [8, 8, 8, 8], DEPTHS: [1, 1, 1, 1], SSM_RATIO: 1.0}\n"
        "DATA: {IMG_SIZE: 64}\nDEVICE: cpu\n"
    )
    words = [tmp_path / "noise.png"] * 2 + ["--cfg", tmp_path / "tiny.yaml", "--what", what]
    assert tool.main([*map(str, words), "--output", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == count
    assert capsys.readouterr().out.startswith("random weights: give trained ones")
    first = [path.read_bytes() for path in files]
    assert tool.main([*map(str, words), "--output", str(tmp_path / "out")]) == 0
    assert [path.read_bytes() for path in files] == first, "the same weights again"
    assert np.asarray(Image.open(files[0]))[16:].std() > 10
