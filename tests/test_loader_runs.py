"""Whole runs on machines with little shared memory, and on several ranks whose data stalls."""

import shutil
import subprocess
import warnings
from types import SimpleNamespace

import pytest
from runs import arguments, finish, start, start_ranks, write_images

from benchmarks import bench_loader

# Runs in a mount namespace of its own: sys.argv is the folder of images and that of results
SMALL = """
import os, subprocess, sys
from pathlib import Path

sys.path.insert(0, "tests")
from runs import run
from quadmamba.configs import load_cfg
from quadmamba.data import build_loaders

data, out = sys.argv[1:]
keys = {"DATA.PATH": data, "DATA.BATCH_SIZE": 24, "DATA.WORKERS": 2, "DATA.IMG_SIZE": 512}


def mount(size):
    subprocess.check_call(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"])


for size in ("64m", "1m"):
    mount(size)
    loaders = build_loaders(load_cfg(flags=keys))
    print(size, len(list(loaders.train)), len(list(loaders.val)), flush=True)
mount("64k")
try:
    Path("/dev/shm/of-others").write_bytes(bytes(2**20))
except OSError:
    print("left", os.statvfs("/dev/shm").f_bavail, flush=True)
flags = ("--data-path", data, "--output", out, "--batch-size", 24, "--epochs", 2)
assert run(*flags, DATA__WORKERS=2) == 0
weights = Path(out) / "quadmamba_lite" / "default" / "last.pth"
assert run(*flags, "--eval", "--pretrained", weights, DATA__WORKERS=2) == 0
print("done")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=60, val=30)


def test_H1_small_shared_memory_is_enough(data, tmp_path):
    """/dev/shm of 64 MB, of 1 MB and without a free byte; no sockets in TMPDIR either."""
    inside = ("unshare", "--mount")
    mount = [*inside, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if not shutil.which("unshare") or subprocess.call(mount, stderr=subprocess.DEVNULL):
        warnings.warn("no mounts here: only test_H1_no_batch_needs_dev_shm", stacklevel=1)
        return
    far = tmp_path / ("long" * 40)  # longer than the name of a socket may be
    far.mkdir()
    process = start(["-c", SMALL, data, tmp_path / "out"], inside=inside, TMPDIR=far)
    code, out, err = finish(process, timeout=150)
    assert code == 0, out + err
    assert out.startswith("64m 5 3\n1m 5 3\nleft 0\n")
    assert out.endswith("\ndone\n")


def test_H1_the_benchmark_says_what_the_other_loader_needs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_loader, "SHARED", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=64e6))
    with pytest.raises(SystemExit) as stopped:
        bench_loader.main(["--workers", "4"])  # 2 x 4 batches of 64 images of 224 x 224 x 3
    assert stopped.value.code == 2
    assert "expected 77 MB free, got 64; docker run --shm-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (["read=kill", "rank=1"], ["was killed by SIGKILL, reading", "/train/class"]),
        (["read=stall"], ["has read no image for 3 s (DATA.TIMEOUT), reading", "/train/class"]),
    ],
    ids=["one rank", "both ranks"],
)
def test_H3_all_ranks_end_with_one_message(data, tmp_path, faults, words):
    flags = ("--data-path", data, "--output", tmp_path, "--batch-size", 4, "--epochs", 1)
    options = arguments(*flags, DATA__WORKERS=2, DATA__TIMEOUT=3.0)
    ends = [finish(p) for p in start_ranks(["tests/faulty.py", *faults, "--", *options])]
    assert [code for code, _, _ in ends] == [2, 2], ends
    errors = "".join(err for _, _, err in ends)
    assert errors.count("error: ") == 1, errors
    assert all(word in errors for word in words), errors
    assert "Traceback" not in errors
