"""Pictures pixel by pixel: colours, frames, lines and panels beside values computed by hand."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from quadmamba.utils import ablation, receptive_field, scan_path, views, visualize
from quadmamba.utils.views import BlockView
from quadmamba.utils.visualize import heat, photo, side_by_side

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(pixels):
    """Pixels (b, 3, h, w) in [0, 1] as models take them."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std


# ------------------------------------------------------------------------------- photos and heat
@pytest.mark.parametrize(
    ("size", "least", "factor"),
    [
        ((40, 50), 160, 4),
        ((41, 90), 160, 4),
        ((160, 200), 160, 1),
        ((39, 60), 160, 5),
        ((8, 7), 20, 3),
    ],
)
def test_a_photo_is_the_image_enlarged_by_a_whole_factor(size, least, factor):
    pixels = torch.rand(2, 3, *size)
    found = photo(normalised(pixels), least)
    expected = np.kron(pixels.numpy(), np.ones((1, 1, factor, factor)))
    torch.testing.assert_close(found, torch.from_numpy(expected).float())
    assert torch.equal(
        photo(normalised(pixels[:, :, :30])), photo(normalised(pixels[:, :, :30]), 160)
    )


def test_a_photo_stays_in_its_range():
    assert photo(torch.full((1, 3, 2, 2), 9.0)).eq(1).all()
    assert photo(torch.full((1, 3, 2, 2), -9.0)).eq(0).all()


def test_panels_stand_in_black_frames_of_four_pixels():
    a, b = torch.full((1, 3, 2, 3), 0.5), torch.full((1, 3, 2, 1), 0.25)
    row = side_by_side([a, b])
    assert row.shape == (1, 3, 10, 11 + 9)
    expected = torch.zeros(10, 20)
    expected[4:6, 4:7], expected[4:6, 15:16] = 0.5, 0.25
    assert torch.equal(row[0], expected.expand(3, -1, -1))


def test_heat_passes_through_its_five_colours():
    stops = [
        (0.10, 0.05, 0.35),
        (0.45, 0.10, 0.60),
        (0.90, 0.35, 0.35),
        (1.0, 0.75, 0.2),
        (1.0, 1.0, 0.8),
    ]
    levels = torch.tensor([0, 0.125, 0.25, 0.4, 0.5, 0.75, 0.95, 1])
    found = heat(levels.view(1, 2, 4))
    assert found.shape == (1, 3, 2, 4)
    at = np.linspace(0, 1, 5)
    for channel in range(3):
        expected = np.interp(levels.numpy(), at, [stop[channel] for stop in stops])
        np.testing.assert_allclose(found[0, channel].flatten(), expected, atol=1e-6)


# ---------------------------------------------------------------------------- scores, partitions
def test_scores_are_colours_over_the_grey_image():
    base = torch.rand(2, 3, 4, 6)
    score = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 5.0, 1.0]], [[0.0, 0.0, 0.0]] * 2])
    found = visualize._score_panel(base, score)
    level = (score - torch.tensor([1.0, 0.0]).view(2, 1, 1)) / 4
    colour = heat(level).repeat_interleave(2, 2).repeat_interleave(2, 3)
    grey = base.sum(1, keepdim=True) / 3
    torch.testing.assert_close(found, 0.35 * grey + 0.65 * colour)
    torch.testing.assert_close(visualize._score_panel(base, None), grey.expand(2, 3, 4, 6))


def test_a_partition_has_white_lines_outside_and_yellow_ones_inside():
    """A grid of 4x4 tokens, 4 pixels each: quadrant 3 is selected and cut in four."""
    window = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 4, 5], [2, 2, 6, 7]])
    view = BlockView("", None, window[None], (window >= 4)[None])
    base = torch.full((1, 3, 16, 16), 0.8)
    found = visualize._partition_panel(base, view)[0]
    white, yellow = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 0.85, 0.0])
    near = {7, 8}  # both sides of the border between quadrants
    for y in range(16):
        for x in range(16):
            inside = y >= 8 and x >= 8
            if y in near or x in near:
                expected = white
            elif inside and (y in (11, 12) or x in (11, 12)):
                expected = yellow
            else:
                expected = torch.full((3,), 0.8 if inside else 0.45 * 0.8)
            torch.testing.assert_close(found[:, y, x], expected, msg=f"{y}, {x}")


@pytest.mark.parametrize(("side", "width"), [(319, 1), (320, 3), (640, 5)])
def test_lines_grow_with_the_picture(side, width):
    labels = torch.zeros(1, 1, side, side + 9)
    labels[..., 100:] = 1
    (columns,) = visualize._borders(labels)[0, 0, 5].nonzero(as_tuple=True)
    assert columns.tolist() == list(range(99 - width // 2, 101 + width // 2))


# ---------------------------------------------------------------------------------------- fields
class Shrinking(nn.Module):
    """Features whose centre is 2 to 5 times one pixel of each image."""

    def forward_features(self, x):
        return [scale * x[:, :2, 1::2, 1::2] for scale in (2.0, 5.0)]


def test_a_field_is_the_mean_size_of_the_gradient():
    images = torch.randn(3, 3, 8, 12)
    model = Shrinking()
    fields = views.receptive_fields(model, images)
    for field, scale in zip(fields, (2.0, 5.0)):
        expected = torch.zeros(8, 12)
        expected[5, 7] = 2 * scale  # the centre (2, 3) of 4x6; two colours take part
        torch.testing.assert_close(field, expected)
    assert model.training
    assert images.grad is None
    assert not images.requires_grad


def test_fields_are_drawn_over_three_decades(monkeypatch):
    strength = torch.tensor([[1.0, 0.1], [0.01, 1e-3], [1e-4, 0.0]])
    monkeypatch.setattr(receptive_field, "receptive_fields", lambda *_: [7 * strength, strength])
    images = normalised(torch.rand(2, 3, 6, 4))
    names, picture = receptive_field.field_image(nn.Identity(), images)
    assert names == ["mean image", "stage 1", "stage 2"]
    base = photo(images).mean(0)
    h, w = base.shape[1:]
    assert picture.shape == (1, 3, h + 8, 3 * (w + 8))
    torch.testing.assert_close(picture[0, :, 4 : 4 + h, 4 : 4 + w], base)
    levels = heat(torch.tensor([[[1.0, 2 / 3], [1 / 3, 0.0], [0.0, 0.0]]]))[0]
    for column in (1, 2):
        panel = picture[0, :, 4 : 4 + h, column * (w + 8) + 4 :][..., :w]
        expected = levels.repeat_interleave(h // 3, 1).repeat_interleave(w // 2, 2)
        torch.testing.assert_close(panel, expected, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------- paths
def test_a_path_is_drawn_from_token_to_token():
    """2x3 tokens, 12 pixels each: 0 1 2, back to 3 in grey, 3 4 5; blue at first, then yellow."""
    position = torch.tensor([[0, 1, 2], [3, 4, 5]])
    found = scan_path._drawn(torch.zeros(3, 24, 36), position)
    picture = Image.new("RGB", (36, 24))
    draw = ImageDraw.Draw(picture)
    points = [(6 + 12 * x, 6 + 12 * y) for y in range(2) for x in range(3)]
    draw.line([points[2], points[3]], (150, 150, 150), 1)
    for step in (0, 1, 3, 4):
        part = step / 5
        colour = [round((1 - part) * a + part * b) for a, b in zip((60, 120, 255), (255, 220, 40))]
        draw.line([points[step], points[step + 1]], tuple(colour), 3)
    assert np.array_equal((255 * found).byte().permute(1, 2, 0), np.asarray(picture))


def test_neighbours_are_tokens_side_by_side():
    """Steps 1 to 3 go to the side, down and to the side; 0 and 4 go elsewhere."""
    position = torch.tensor([[0, 3, 4], [5, 2, 1]])
    found = (255 * scan_path._drawn(torch.zeros(3, 24, 36), position)).round()
    grey = torch.tensor([150.0] * 3)
    assert torch.equal(found[:, 12, 18], grey) or found[:, 12, 18].max() > 150, "0 to 5 crosses"
    drawn = {tuple(c) for c in found.flatten(1).T.int().tolist()} - {(0, 0, 0), (150, 150, 150)}
    expected = set()
    for step in (1, 2, 3):
        part = step / 5
        mixed = zip((60, 120, 255), (255, 220, 40))
        expected.add(tuple(round((1 - part) * a + part * b) for a, b in mixed))
    assert drawn == expected


def test_panels_of_paths_are_dark_and_stand_beside_the_image(monkeypatch):
    places = torch.arange(4).view(1, 2, 2)
    shown = {"a": places, "b": places, "c": places.flip(1), "d": torch.zeros(1, 1, 1).long()}
    monkeypatch.setattr(scan_path, "scan_positions", lambda *_: shown)
    images = normalised(torch.full((1, 3, 8, 8), 0.5))
    names, picture = scan_path.path_images(nn.Identity(), images)
    assert names == ["image", "a", "c", "d"], "b scans as a"
    side = 24  # 12 pixels a token, 8 enlarged by 3
    assert picture.shape == (1, 3, side + 8, 4 * (side + 8))
    torch.testing.assert_close(picture[0, :, 5, 5], torch.full((3,), 0.5))
    last = picture[0, :, 4 : 4 + side, 3 * (side + 8) + 4 :][..., :side]
    assert (last - 0.25).abs().max() < 0.01, "half as bright, and no path through one token"


# ---------------------------------------------------------------------------- tables and plots
def result(row, seed, top1, rates=None):
    rates = rates or {}
    found = {k: {"rate": r, "constant": c, "chance": 0.25} for k, (r, c, _) in rates.items()}
    fresh = {k: {"rate": f, "constant": 0.9, "chance": 0.25} for k, (_, _, f) in rates.items()}
    return ablation.Result(row, seed, top1, 1.23456, 5_432_100, 0.21987, 61.6, found, fresh)


RUNS = [
    result("a", 0, 90.123),
    result("b", 1, 50.0, {"one": (0.5, 0.3, 0.2), "two": (0.61, 0.4, 0.25)}),
    result("a", 1, 92.0),
    result("b", 0, 60.0, {"one": (0.7, 0.5, 0.4), "two": (0.65, 0.4, 0.25)}),
]


def test_the_csv_line_by_line(tmp_path):
    ablation.write_csv(tmp_path / "runs.csv", RUNS)
    share = "centre in the selected quadrant"
    assert (tmp_path / "runs.csv").read_text().splitlines() == [
        f'row,seed,top1,loss,params,gmacs,seconds,"{share}, one","{share}, two"',
        "a,0,90.12,1.2346,5432100,0.2199,62,,",
        "b,1,50.00,1.2346,5432100,0.2199,62,0.5000,0.6100",
        "a,1,92.00,1.2346,5432100,0.2199,62,,",
        "b,0,60.00,1.2346,5432100,0.2199,62,0.7000,0.6500",
    ]


def test_the_markdown_line_by_line():
    assert ablation.markdown("order", RUNS).split("\n") == [
        "## order",
        "",
        "| row | top-1, % | seeds | parameters, M | multiply-adds, G |",
        "|---|---|---|---|---|",
        "| a | 91.1 ± 1.3 | 2 | 5.43 | 0.220 |",
        "| b | 55.0 ± 7.1 | 2 | 5.43 | 0.220 |",
        "",
        "| row | block | centre in the selected quadrant, % | before training, % "
        "| best fixed quadrant, % |",
        "|---|---|---|---|---|",
        "| b | one | 60.0 ± 14.1 | 30.0 ± 14.1 | 40.0 ± 14.1 |",
        "| b | two | 63.0 ± 2.8 | 25.0 ± 0.0 | 40.0 ± 0.0 |",
        "",
    ]
    assert list(ablation.rows_of(RUNS)) == ["a", "b"]
    assert [run.seed for run in ablation.rows_of(RUNS)["b"]] == [1, 0]


def test_the_plot_stroke_by_stroke(tmp_path):
    """The axis goes from 50 to 100, x from 250 to 860: 12.2 pixels for a percent."""
    ablation.plot(tmp_path / "plot.png", "order", RUNS)
    expected = Image.new("RGB", (900, 56 + 2 * 44 + 50), "white")
    draw, font = ImageDraw.Draw(expected), ImageFont.load_default(16)
    title = "order: top-1, %; a point is a seed, the stroke their mean"
    draw.text((20, 16), title, "#202020", font)
    for tick in (50, 60, 70, 80, 90, 100):
        x = 250 + 12.2 * (tick - 50)
        draw.line([(x, 56), (x, 144)], "#d8d8d8")
        draw.text((x, 152), str(tick), "#202020", font, anchor="ma")
    for name, y, points in (("a", 78, (90.123, 92.0)), ("b", 122, (50.0, 60.0))):
        draw.text((234, y), name, "#202020", font, anchor="rm")
        for x in (250 + 12.2 * (point - 50) for point in points):
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], "#7aa6d8", "#202020")
        x = 250 + 12.2 * (sum(points) / 2 - 50)
        draw.line([(x, y - 14), (x, y + 14)], "#c0392b", 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "plot.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ((90.05, 90.95), (90.0, 91.0)),
        ((90.1, 91.1), (90.0, 92.5)),
        ((88.0, 92.9), (88.0, 93.0)),
        ((80.0, 89.9), (80.0, 90.0)),
        ((61.0, 79.0), (60.0, 80.0)),
        ((10.0, 45.0), (10.0, 60.0)),
        ((0.0, 99.0), (0.0, 100.0)),
    ],
)
def test_the_axis_has_five_steps_of_a_round_size(values, ends):
    assert ablation._frame(*values) == pytest.approx(ends)
