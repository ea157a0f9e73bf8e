"""The program that compares loss curves, on the CPU, where all precisions are float32."""

import csv
from collections import defaultdict

from PIL import Image
from runs import write_images

from benchmarks import loss_curves


def test_curves_are_written_and_drawn(tmp_path, capsys):
    data = write_images(tmp_path / "data", train=64, val=1)
    words = ["--data", str(data), "--output", str(tmp_path / "curves"), "--device", "cpu"]
    assert loss_curves.main([*words, "--steps", "5", "--variants", "fp32", "bf16"]) == 0
    curves = defaultdict(list)
    for row in csv.DictReader((tmp_path / "curves.csv").open()):
        assert int(row["step"]) == len(curves[row["variant"]])
        curves[row["variant"]].append(float(row["loss"]))
    assert len(curves["fp32"]) == 5
    assert len(set(curves["fp32"])) == 5
    assert curves["fp32"] == curves["bf16"]
    with Image.open(tmp_path / "curves.png") as picture:
        colors = {color for _, color in picture.getcolors(1 << 16)}
    assert (65, 105, 225) in colors  # the last curve covers the first
    assert "largest gap 0.0000" in capsys.readouterr().out


def test_smoothing_and_the_gap(capsys):
    assert loss_curves.smooth([4, 2, 0, 2, 2, 9]) == [4, 3, 2, 2, 2, 3]
    loss_curves.report({"fp32": [1.0] * 9, "fp16": [1.0] * 8 + [2.0]})
    assert "fp16   1.0000 -> 1.2000  largest gap 0.2000" in capsys.readouterr().out


def test_no_data_is_one_message(tmp_path, capsys):
    words = [
        "--data",
        str(tmp_path / "nowhere"),
        "--output",
        str(tmp_path / "c"),
        "--device",
        "cpu",
    ]
    assert loss_curves.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")
