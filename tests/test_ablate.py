"""tools/ablate.py and what it stands on: canvases in memory, rates of the partition, the report."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import fill_up
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from quadmamba.configs import load_cfg
from quadmamba.data import DataError
from quadmamba.data.canvases import CanvasLoader, read_canvases
from quadmamba.models import QuadMamba, build_model
from quadmamba.tools import ablate
from quadmamba.utils import ablation
from quadmamba.utils.views import centre_rates, quad_blocks

SIZE = 32
TINY = ["MODEL.DIMS", "[8,8,8,8]", "MODEL.DEPTHS", "[2,1,1,1]", "DATA.IMG_SIZE", str(SIZE)]
TINY += ["DATA.BATCH_SIZE", "8", "TRAIN.WARMUP_EPOCHS", "0", "DEVICE", "cpu"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder like one of make_digits: a bright square at a place that positions.csv tells."""
    root, rng = tmp_path_factory.mktemp("canvases"), np.random.default_rng(0)
    lines = ["file,center_y,center_x,side,size"]
    for part, count in (("train", 20), ("val", 12)):
        for i in range(count):
            y, x = rng.integers(4, SIZE - 4, 2)
            pixels = np.zeros((SIZE, SIZE), np.uint8)
            pixels[y - 2 : y + 2, x - 2 : x + 2] = 255
            path = root / part / str(i % 10) / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            lines.append(f"{path.relative_to(root)},{y},{x},4,{SIZE}")
    (root / "positions.csv").write_text("\n".join(lines) + "\n")
    return root


# ------------------------------------------------------------------------------------- canvases
def test_canvases_are_read_with_labels_and_centres(digits):
    canvases = read_canvases(digits, "val")
    assert canvases.images.shape == (12, SIZE, SIZE)
    assert canvases.images.dtype == torch.uint8
    assert canvases.targets.tolist() == [*range(10), 0, 1]
    for image, centre in zip(canvases.images, canvases.centres):
        y, x = (centre * SIZE).round().long().tolist()
        assert image[y - 2 : y + 2, x - 2 : x + 2].eq(255).all()
        assert image.gt(0).sum() == 16


def test_a_single_canvas_is_read(digits, tmp_path):
    lines = (digits / "positions.csv").read_text().splitlines()
    (tmp_path / "val" / "0").mkdir(parents=True)
    Image.new("L", (8, 8), 9).save(tmp_path / "val/0/00000.png")
    (tmp_path / "positions.csv").write_text(f"{lines[0]}\nval/0/00000.png,2,6,1,8\n")
    canvases = read_canvases(tmp_path, "val")
    assert canvases.centres.tolist() == [[0.25, 0.75]]
    assert canvases.images.tolist() == [[[9] * 8] * 8]


def test_validation_batches_are_the_normalised_canvases_in_order(digits):
    canvases = read_canvases(digits, "val")
    loader = CanvasLoader(canvases, 5, shuffle=False)
    batches = list(loader)
    assert [len(targets) for _, targets in batches] == [5, 5, 2]
    assert len(loader) == 3
    images, targets = (torch.cat(parts) for parts in zip(*batches))
    assert torch.equal(targets, canvases.targets)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    expected = (canvases.images[:, None] / 255 - mean) / std
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


def test_training_batches_move_and_depend_on_seed_and_epoch_alone(digits):
    canvases = read_canvases(digits, "train")

    def epoch(number, seed=0, seen=0):
        loader = CanvasLoader(canvases, 8, shuffle=True, seed=seed)
        loader.sampler.set_epoch(number, seen)
        batches = list(loader)
        assert len(batches) == len(loader) == 2 - seen // 8, "the last 4 of 20 are left out"
        return [torch.cat(parts) for parts in zip(*batches)]

    first = epoch(0)
    assert torch.equal(first[0], epoch(0)[0])
    assert torch.equal(first[0][8:], epoch(0, seen=8)[0])
    for other in (epoch(1), epoch(0, seed=1)):
        assert not torch.equal(first[1], other[1])
    places = {}
    for number in range(12):
        for image, target in zip(*epoch(number)):
            lit = (image[0] > 0).nonzero().float()
            if len(lit) == 16:  # a square at the border may be cut
                places.setdefault(int(target), []).append(lit.mean(0))
    moves = torch.cat([torch.stack(p) - torch.stack(p).mean(0) for p in places.values()])
    assert moves.abs().max() > 1, "canvases move"
    known = [canvases.centres[canvases.targets == t] * SIZE - 0.5 for t in range(10)]
    for target, found in places.items():
        nearest = torch.cdist(torch.stack(found), known[target], p=float("inf")).min(1).values
        assert nearest.max() <= SIZE // 14, "by at most a 14th of the side"


def test_a_folder_without_canvases_is_named(digits, tmp_path):
    with pytest.raises(DataError, match=r"no such file: .*positions\.csv; make the data with"):
        read_canvases(tmp_path, "train")
    with pytest.raises(DataError, match="expected canvases of test/, found none"):
        read_canvases(digits, "test")


# ---------------------------------------------------------------------------------------- rates
def choose(op, logits):
    """Let `op` select by these logits (4) whatever the image."""
    pool = op.order.maps(8, 8, op.shift(8, 8), torch.device("cpu")).pool
    op.predictor.forward = lambda x: logits[pool.long()].view(1, 8, 8).expand(len(x), 8, 8)


def test_rates_count_where_the_selected_quadrant_holds_the_point():
    torch.manual_seed(0)
    model = QuadMamba([8] * 4, depths=[2, 1, 1, 1], orders=["quadtree"] + ["raster"] * 3)
    blocks = quad_blocks(model)
    for op, quadrant in zip(blocks.values(), (1, 0)):
        choose(op, torch.eye(4)[quadrant])
    points = torch.tensor([[0.9, 0.9], [0.9, 0.6], [0.2, 0.2], [0.05, 0.9], [0.98, 0.98]])
    rates = centre_rates(model, zip(torch.randn(5, 3, 32, 32).split(3), points.split(3)))
    assert list(rates) == list(blocks)
    plain, shifted = rates.values()
    assert plain == {"rate": 0.2, "constant": 0.6, "chance": 0.25}
    # Rolled by a token, quadrant 0 holds rows and columns 7, 0, 1, 2: all points but the second
    assert shifted["rate"] == pytest.approx(0.8)
    corner = centre_rates(model, [(torch.randn(2, 3, 32, 32), torch.tensor([[0.1, 0.3]] * 2))])
    assert corner["stage 1 block 1"] == {"rate": 0.0, "constant": 1.0, "chance": 0.25}


# ---------------------------------------------------------------------------------- the program
def test_every_row_of_every_table_is_a_model_of_its_own():
    for rows in ablate.TABLES.values():
        seen = set()
        for keys in rows.values():
            opts = [w for k, v in keys.items() for w in (f"MODEL.{k}", json.dumps(v))]
            cfg = load_cfg("ablation", opts=[*opts, "MODEL.DIMS", "[8,8,8,8]"])
            model = build_model(cfg, 10)
            with torch.no_grad():
                assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
            seen.add(str(model))
        assert len(seen) == len(rows)


def command(digits, output, *words):
    return ["order", "--data", str(digits), "--output", str(output), *map(str, words)]


def test_a_table_is_trained_written_and_resumed(digits, tmp_path, capsys):
    words = command(digits, tmp_path, "--rows", "raster", "quadtree", "--seeds", 2, "--epochs", 2)
    words += ["--opts", *TINY]
    assert ablate.main(words) == 0
    assert "0 of 4 runs are finished, 4 to go" in capsys.readouterr().out
    folder = tmp_path / "order"
    runs = json.loads((folder / "runs.json").read_text())
    assert [(run["row"], run["seed"]) for run in runs] == [
        (row, seed) for row in ("raster", "quadtree") for seed in (0, 1)
    ]
    assert runs[0]["loss"] != runs[1]["loss"], "seeds differ"
    assert runs[0]["rates"] == {}
    assert list(runs[2]["rates"]) == [
        "stage 1 block 1",
        "stage 1 block 2, shifted",
        "stage 2 block 1",
    ]
    assert runs[2]["made_with"]["config"]["MODEL"]["ORDERS"] == [
        "quadtree",
        "quadtree",
        "raster",
        "raster",
    ]
    with open(folder / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["top1"]) for line in lines] == [round(run["top1"], 2) for run in runs]
    assert Image.open(folder / "plot.png").size[0] > 400

    kept = (folder / "raster-1" / "result.json").read_bytes()
    before = json.loads((folder / "quadtree-1" / "result.json").read_text())
    (folder / "quadtree-1" / "result.json").unlink()
    (folder / "quadtree-1" / "last.pth").unlink()
    assert ablate.main(words) == 0
    assert "3 of 4 runs are finished, 1 to go" in capsys.readouterr().out
    assert (folder / "raster-1" / "result.json").read_bytes() == kept
    after = json.loads((folder / "quadtree-1" / "result.json").read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}, "the same run once more"
    (folder / "raster-1" / "result.json").unlink()
    for path in (folder / "raster-1").glob("*.pth"):
        path.write_bytes(b"damaged")
    assert ablate.main(words) == 2
    assert "error: " in capsys.readouterr().err
    (folder / "raster-1" / "result.json").write_bytes(kept)
    words[words.index("--epochs") + 1] = "3"
    assert ablate.main(words) == 2
    assert "was made with other settings; choose another --output" in capsys.readouterr().err


def test_runs_go_to_processes_of_their_own(digits, tmp_path):
    rows = ("--rows", "raster", "random quadrant")
    opts = (*rows, "--seeds", 1, "--epochs", 1, "--opts", *TINY)
    assert ablate.main(command(digits, tmp_path / "two", "--jobs", 2, *opts)) == 0
    assert ablate.main(command(digits, tmp_path / "one", *opts)) == 0
    results = []
    for folder in ("one", "two"):
        runs = json.loads((tmp_path / folder / "order/runs.json").read_text())
        results.append([(run["row"], run["top1"], run["rates"]) for run in runs])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opts", "MODEL.TUA", "1"], "unknown key MODEL.TUA"),
        (["--opts", "DATA.IMG_SIZE", "64", "DEVICE", "cpu"], "IMG_SIZE 64 pixels, got 32"),
        (["--opts", *TINY[:6], "DATA.BATCH_SIZE", "64"], "expected at most 20, the canvases in"),
        (["--cfg", "none.yaml"], "no such file: none.yaml"),
    ],
)
def test_wrong_input_ends_with_a_message(digits, tmp_path, capsys, words, message):
    assert ablate.main(command(digits, tmp_path, *words)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", 0], "--jobs of 1 or more"),
        (["--rows", "rastre"], "expected some of raster, window 7x7, .*, got rastre"),
    ],
)
def test_wrong_options_exit_with_2(digits, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        ablate.main(command(digits, tmp_path, *words))
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# --------------------------------------------------------------------------------------- report
@pytest.mark.parametrize("name", ["runs.csv", "table.md", "plot.png", "runs.json"])
def test_C10_a_report_that_cannot_be_written_is_named(digits, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(ablate, "run", lambda job: result(job.row, job.seed, 50.0))
    table = tmp_path / "order"
    table.mkdir()
    assert ablate.main(command(digits, tmp_path)) == 0
    before = (table / name).read_bytes()
    fill_up(table / name)
    assert ablate.main(command(digits, tmp_path)) == 2
    assert re.match(f"error: cannot write .*{name}.*No space left", capsys.readouterr().err)
    assert (table / name).read_bytes() == before
    (table / name).unlink()
    (table / name).mkdir()
    assert ablate.main(command(digits, tmp_path)) == 2
    assert "there is a folder of this name" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"row": "raster"}'])
def test_a_result_that_is_half_there_is_named(digits, tmp_path, capsys, content):
    folder = tmp_path / "order" / "raster-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)
    assert ablate.main(command(digits, tmp_path, "--rows", "raster")) == 2
    assert re.match(r"error: .*result\.json is damaged .*remove it", capsys.readouterr().err)


def result(row, seed, top1, **rates):
    rates = {k: {"rate": v, "constant": 0.3, "chance": 0.25} for k, v in rates.items()}
    return ablation.Result(row, seed, top1, 1.0, 5_000_000, 0.2, 1.0, rates, rates)


def test_the_table_holds_means_and_sample_deviations():
    runs = [result("a", 0, 90.0), result("a", 1, 92.0), result("b", 0, 50.0, block=0.5)]
    text = ablation.markdown("order", runs)
    assert "| a | 91.0 ± 1.4 | 2 | 5.00 | 0.200 |" in text
    assert "| b | 50.0 | 1 | 5.00 | 0.200 |" in text
    assert "| b | block | 50.0 | 50.0 | 30.0 |" in text
    assert "| a | block" not in text


@pytest.mark.parametrize("values", [(50.0, 50.0), (0.0, 100.0), (97.4, 98.9)])
def test_points_lie_inside_the_plot(tmp_path, values):
    ablation.plot(tmp_path / "p.png", "order", [result("a", i, v) for i, v in enumerate(values)])
    pixels = np.asarray(Image.open(tmp_path / "p.png")).astype(int)
    blue = (abs(pixels - [0x7A, 0xA6, 0xD8]).sum(-1) < 20).nonzero()
    assert blue[1].min() > 240
    assert blue[1].max() < 880
    assert (abs(pixels - [0xC0, 0x39, 0x2B]).sum(-1) < 20).any(), "the mean"
