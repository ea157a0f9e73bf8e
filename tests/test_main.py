"""Every mode of main.py, on the CPU, with one process and with two."""

import json
import math
import re

import pytest
import torch
from runs import ROOT, arguments, finish, free_port, run, start, two_ranks, write_images

from quadmamba.main import main
from quadmamba.utils import engine

FLAGS = ("--batch-size", 4, "--epochs", 2)
ACCURACY = re.compile(r"top-1 ([\d.]+) %")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The output folder of a short training."""
    out = tmp_path_factory.mktemp("out")
    assert run("--data-path", data, "--output", out, *FLAGS) == 0
    return out / "quadmamba_lite" / "default"


def same(a, b):
    """True where two checkpoints hold the same values, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(folder):
    payload = torch.load(folder / "last.pth", weights_only=True)
    return {key: value for key, value in payload.items() if key != "config"}


def test_info_needs_no_data_and_ends_with_json(capsys):
    assert run("--info") == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line) == {"model", "params", "gmacs", "img_size"}
    assert line["model"] == "quadmamba_lite"
    assert line["img_size"] == 32
    assert line["params"] > 10_000
    assert line["gmacs"] > 0


def test_throughput_needs_no_data(capsys):
    assert run("--throughput", "--batch-size", 2) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["inference_img_s"] > 0
    assert line["training_img_s"] > 0


def test_training_writes_checkpoints_and_logs(trained):
    assert {"last.pth", "best.pth", "log.jsonl"} <= {path.name for path in trained.iterdir()}
    assert list(trained.glob("events.out.tfevents*"))
    assert not list(trained.glob(".*"))
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["updates"] for line in steps] == list(range(1, 9))
    assert {"epoch", "loss", "lr", "grad_norm", "images_per_s", "skipped"} <= set(steps[0])
    validations = [line for line in lines if line["kind"] == "val"]
    assert [line["epoch"] for line in validations] == [1, 2]
    assert validations[0]["model_images"] == validations[0]["ema_images"] == 10


def test_tensorboard_gets_scalars_and_partitions(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    assert {"train/loss", "train/lr", "val/model_top1", "val/ema_top1"} <= set(
        events.Tags()["scalars"]
    )
    assert any(name.startswith("partition") for name in events.Tags()["images"])


def test_eval_prints_the_accuracy_of_the_training_twice(data, trained, capsys):
    best = torch.load(trained / "best.pth", weights_only=True)["best"]
    lines = []
    for _ in range(2):
        flags = ("--eval", "--pretrained", trained / "best.pth", "--data-path", data)
        assert run(*flags, "--batch-size", 3) == 0
        out = capsys.readouterr().out
        lines.append(out.splitlines()[-1])
        assert f"top-1 {best['top1']:.2f} %" in out
        assert out.index("GMACs") < out.index("accuracy of")
    assert lines[0] == lines[1]
    result = json.loads(lines[0])
    assert result["top1"] == best["top1"]
    assert result["weights"] == best["weights"]
    assert result["images"] == 10


def test_pretrained_is_reported_before_training(data, trained, tmp_path, capsys):
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 4, "--epochs", 1)
    assert run(*flags, "--pretrained", trained / "best.pth") == 0
    out = capsys.readouterr().out
    places = [out.index(text) for text in ("GMACs", "loaded ", "accuracy of", "epoch 1/1")]
    assert places == sorted(places)


def test_fine_tuning_gets_a_new_head_and_says_so(trained, tmp_path, capsys):
    data = write_images(tmp_path / "data", train=2, val=1, classes=3)
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 2, "--epochs", 1)
    assert run(*flags, "--pretrained", trained / "best.pth") == 0
    assert "new head" in capsys.readouterr().out


def test_weights_of_another_order_are_announced(data, trained, capsys):
    flags = ("--eval", "--pretrained", trained / "best.pth", "--data-path", data)
    assert run(*flags, "--batch-size", 4, MODEL__ORDERS="[release,quadtree,raster,raster]") == 0
    assert "MODEL.ORDERS: the weights were trained with" in capsys.readouterr().out


def test_one_seed_gives_the_same_bits_and_another_does_not(data, trained, tmp_path):
    assert run("--data-path", data, "--output", tmp_path, *FLAGS) == 0
    assert run("--data-path", data, "--output", tmp_path, *FLAGS, "--tag", "b", "--seed", 1) == 0
    first, again = state_of(trained), state_of(tmp_path / "quadmamba_lite" / "default")
    assert same(first, again)
    assert not same(first["model"], state_of(tmp_path / "quadmamba_lite" / "b")["model"])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "resume"])
def test_a_continued_run_ends_with_the_same_bits(
    data, trained, tmp_path, monkeypatch, capsys, explicit
):
    def stop_in_second_epoch(cfg, run):
        if run.progress.epoch == 1:
            engine.wait_for_writer(run)
            raise KeyboardInterrupt
        return engine_train_epoch(cfg, run)

    engine_train_epoch = engine.train_epoch
    flags = ("--data-path", data, *FLAGS)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_epoch", stop_in_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--output", tmp_path)
    last = tmp_path / "quadmamba_lite" / "default" / "last.pth"
    extra = ("--resume", last, "--tag", "other") if explicit else ()
    assert run(*flags, "--output", tmp_path, *extra) == 0
    assert "after epoch 1 of 2" in capsys.readouterr().out
    folder = tmp_path / "quadmamba_lite" / ("other" if explicit else "default")
    assert same(state_of(trained), state_of(folder))


def test_a_restart_of_a_resumed_run_goes_on_where_it_is(data, trained, tmp_path, capsys):
    flags = ("--data-path", data, "--output", tmp_path, *FLAGS)
    resumed = (*flags, "--resume", trained / "last.pth", "--epochs", 3)
    assert run(*resumed) == 0
    assert f"continuing {trained / 'last.pth'} after epoch 2 of 3" in capsys.readouterr().out
    assert run(*resumed) == 0
    own = tmp_path / "quadmamba_lite" / "default" / "last.pth"
    assert f"continuing {own} after epoch 3 of 3" in capsys.readouterr().out


def test_a_finished_run_trains_no_further(data, trained, tmp_path, capsys):
    flags = ("--data-path", data, "--output", tmp_path, *FLAGS)
    assert run(*flags, "--resume", trained / "last.pth") == 0
    out = capsys.readouterr().out
    assert "after epoch 2 of 2" in out
    assert "step 1/" not in out
    assert "done: best top-1" in out


def test_accumulation_without_average_and_with_rarer_validation(data, tmp_path):
    opts = {"TRAIN__EMA": False, "TRAIN__ACCUM_STEPS": 3, "TRAIN__EVAL_EVERY": 2}
    assert run("--data-path", data, "--output", tmp_path, *FLAGS, **opts, TRAIN__SAVE_EVERY=2) == 0
    folder = tmp_path / "quadmamba_lite" / "default"
    payload = torch.load(folder / "last.pth", weights_only=True)
    assert payload["updates"] == 4  # 4 batches an epoch, in steps of 3 and 1
    assert payload["ema"] is None
    assert payload["best"]["weights"] == "model"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "val"] == [2]


def test_skipped_images_are_counted(tmp_path, capsys):
    data = write_images(tmp_path / "data", train=4, val=2)
    (data / "val" / "class1" / "0.png").write_bytes(b"no image")
    (data / "train" / "class0" / "1.png").write_bytes(b"no image")
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 4, "--epochs", 1)
    assert run(*flags, DATA__ON_ERROR="skip") == 0
    out = capsys.readouterr().out
    assert "1 unreadable images of train" in out
    assert "1 unreadable images of val were left out (DATA.ON_ERROR skip): " in out
    assert f"{data}/val/class1/0.png; tools/check_data.py" in out
    assert "images 3" in out


def test_every_flag_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--cfg", "--eval", "--throughput", "--info", "--data-path", "--opts"):
        assert flag in text


def test_a_run_continued_with_another_batch_size_keeps_its_schedule(data, tmp_path, capsys):
    flags = ("--data-path", data, *FLAGS, "--output", tmp_path, "--epochs", 1)
    assert run(*flags, "--opts", "TRAIN.WARMUP_EPOCHS", 0) == 0
    more = ("--epochs", 3, "--batch-size", 2, "--opts", "TRAIN.WARMUP_EPOCHS", 0)
    assert run(*flags, *more) == 0
    assert "the learning rate follows the epoch" in capsys.readouterr().out
    lines = (tmp_path / "quadmamba_lite/default/log.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
    assert [entry["updates"] for entry in steps] == [1, 2, 3, 4, *range(9, 25)]
    for number, entry in enumerate(steps):  # 4 steps of 4 images in all, then of 2 images 24
        scale, whole = (4 / 512, 4) if number < 4 else (2 / 512, 24)
        cosine = (1 + math.cos(math.pi * entry["updates"] / whole)) / 2
        assert entry["lr"] == pytest.approx(scale * (5e-6 + (5e-4 - 5e-6) * cosine))


def test_launch_command_trains_with_two_processes(data, trained, tmp_path):
    """The command of the original instructions, word for word but for the paths."""
    launch = ["-m", "torch.distributed.launch", "--nnodes=1", "--node_rank=0"]
    launch += ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    words = arguments(
        *("--batch-size", 4, "--data-path", data, "--output", tmp_path),
        *("--pretrained", trained / "best.pth", "--epochs", 1),
    )
    code, out, err = finish(start([*launch, "main.py", *words]))
    assert code == 0, err
    assert "batch: 4 x 1 steps x 2 processes = 8" in out
    assert out.index("accuracy of") < out.index("epoch 1/1")
    assert out.count("done: best top-1") == 1
    folder = tmp_path / "quadmamba_lite" / "default"
    payload = torch.load(folder / "best.pth", weights_only=True)
    assert payload["updates"] == 2
    assert payload["metrics"]["model"]["images"] == 10


def test_torchrun_evaluates_every_image_once(data, trained, capsys):
    flags = ("--eval", "--pretrained", trained / "best.pth", "--data-path", data)
    words = arguments(*flags, "--batch-size", 3)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    process = start([*torchrun, "main.py", *words])
    assert main(words) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    code, out, err = finish(process)
    assert code == 0, err
    two = json.loads(out.splitlines()[-1])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert [two[key] for key in ("top1", "top5", "images")] == [
        one[key] for key in ("top1", "top5", "images")
    ]


def test_two_ranks_judge_37_images_as_one_does(trained, tmp_path, capsys):
    data = write_images(tmp_path / "data", train=1, val=19)
    (data / "val/class0/3.png").unlink()
    weights = ("--eval", "--pretrained", trained / "best.pth")
    words = arguments(*weights, "--data-path", data, "--batch-size", 8)
    assert main(words) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    ends = two_ranks(["main.py", *words])
    assert [code for code, _, _ in ends] == [0, 0], ends
    two = json.loads(ends[0][1].splitlines()[-1])
    assert one["images"] == 37
    assert [two[k] for k in ("top1", "top5", "images")] == [
        one[k] for k in ("top1", "top5", "images")
    ]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(data, tmp_path, capsys):
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 4)
    assert run(*flags, "--epochs", 2) == 0
    last = tmp_path / "quadmamba_lite/default/last.pth"
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    assert run(*flags, "--epochs", 2) == 0
    out = capsys.readouterr().out
    warning = out[out.index("warning: ") :]
    assert warning.index(str(last)) < warning.index("last.1.pth is used instead")
    assert "after epoch 1 of 2" in out
    assert state_of(last.parent)["epoch"] == 2


def test_another_number_of_ranks_goes_on_with_the_images_that_were_not_seen(
    data, tmp_path, monkeypatch
):
    def leave(cfg, run, names, save=engine.save):
        save(cfg, run, names)
        engine.wait_for_writer(run)
        raise KeyboardInterrupt

    flags = ("--data-path", data, "--output", tmp_path, "--epochs", 1, "--batch-size")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save", leave)
        patch.setattr(engine, "_is_due", lambda _, run: run.progress.step == 2)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, 4)
    words = arguments(*flags, 2, TRAIN__SAVE_MINUTES=0.0)
    ends = two_ranks(["main.py", *words])
    assert [code for code, _, _ in ends] == [0, 0], ends
    out = ends[0][1]
    assert "1 ranks x batch 4 x 1 steps, now 2 x 2 x 1" in out
    assert "not bit-equal" in out
    assert "after epoch 0 of 1 and 8 images of the next" in out
    assert out.count("epoch 1/1  step") == 2  # 16 images, 4 in each step
    assert out.index("epoch 1/1  step 3/4  ") < out.index("epoch 1/1  step 4/4  ")
    assert state_of(tmp_path / "quadmamba_lite/default")["updates"] == 4


def test_torchrun_measures_throughput_and_ends_on_all_ranks():
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    words = arguments("--throughput", "--batch-size", 2, "--local-rank", 0)
    code, out, err = finish(start([*torchrun, "main.py", *words]))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["training_img_s"] > 0


def test_plain_python_from_the_root():
    code, out, err = finish(start(["main.py", *arguments("--info")]))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["model"] == "quadmamba_lite"
    assert (ROOT / "main.py").is_file()
