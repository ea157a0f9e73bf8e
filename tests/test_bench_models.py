"""The program that times whole models, on the CPU with one step."""

import csv

import pytest

from benchmarks import bench_models


def test_every_row_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "models.csv"
    words = ["--device", "cpu", "--modes", "eager", "--models", "quadmamba_lite", "resnet50"]
    words += ["--size", "32", "--growth", "64x40", "--batch", "5", "--warmup", "0", "--steps", "1"]
    assert bench_models.main([*words, "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    shapes = {(row["model"], row["height"], row["width"], row["batch"]) for row in rows}
    assert shapes == {
        ("quadmamba_lite", "32", "32", "5"),
        ("resnet50", "32", "32", "5"),
        ("quadmamba_small", "64", "40", "2"),
    }
    assert [row["phase"] for row in rows] == ["inference", "training"] * 3
    assert [round(float(row["params_m"]), 2) for row in rows[::2]] == [5.47, 25.56, 31.25]
    for row in rows:
        seconds = float(row["ms"]) / 1e3
        assert float(row["img_s"]) * seconds == pytest.approx(int(row["batch"]))
        tokens = int(row["batch"]) * int(row["height"]) * int(row["width"]) / 16
        assert float(row["ns_per_token"]) * tokens == pytest.approx(1e9 * seconds)
        assert "--growth 64x40" in row["command"]
        assert row["torch"]
    out = capsys.readouterr().out
    assert all(out.count(f"{name} ") >= 2 for name, *_ in shapes)


def test_a_failure_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no room\nfor this")

    monkeypatch.setattr(bench_models.Trial, "infer", fail)
    words = ["--device", "cpu", "--modes", "eager", "--models", "quadmamba_lite", "--growth"]
    words += ["--size", "32", "--batch", "1", "--warmup", "0", "--steps", "1"]
    assert bench_models.main([*words, "--csv", str(tmp_path / "m.csv")]) == 1
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert [row["error"] for row in rows] == ["RuntimeError: no room", ""]
    assert "failed: RuntimeError: no room" in capsys.readouterr().out


def test_growth_is_the_largest_over_the_smallest_of_each_phase():
    def row(ns, phase="training", **more):
        at = {"model": bench_models.GROWN, "mode": "graph", "phase": phase}
        return {**at, "ns_per_token": ns, "bytes_per_token": 2 * ns * ns, **more}

    rows = [row(10.0), row(11.0), row(50.0, model="resnet50"), row(4.0, "inference")]
    failed = {"model": bench_models.GROWN, "mode": "graph", "phase": "training", "error": "no room"}
    assert bench_models.growth([*rows, failed]) == [
        "quadmamba_small graph training over 2 sizes: ns_per_token +10.0 %, bytes_per_token +21.0 %"
    ]


@pytest.mark.parametrize(
    "words", [["--models", "resnet"], ["--growth", "3x4x5"], ["--modes", "graph"]]
)
def test_wrong_words_are_errors(words):
    with pytest.raises(SystemExit) as error:
        bench_models.main(["--device", "cpu", "--modes", "eager", *words])
    assert error.value.code == 2
