"""What the tests of whole runs share: a tiny image folder, a tiny model, and processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quadmamba.main import main
from quadmamba.utils.writer import partial_of

ROOT = Path(__file__).parents[1]
TINY = {
    "MODEL.DIMS": "[8,16,24,32]",
    "MODEL.DEPTHS": "[1,1,1,1]",
    "DATA.WORKERS": 0,
    "TRAIN.WARMUP_EPOCHS": 0,
    "TRAIN.EMA_DECAY": 0.5,
    "LOG_EVERY": 1,
    "LOG_IMAGES": 1,
    "DEVICE": "cpu",
}


def write_images(root: Path, train: int = 8, val: int = 5, classes: int = 2) -> Path:
    """An image folder with train and val images per class; the classes differ in colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., label % 3] += 60
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def arguments(*flags: object, **opts: object) -> list[str]:
    """A command line of the tiny model; keys of opts are written with __ for the dot.

    A flag with a value that is given again counts as given last.
    """
    keys = TINY | {key.replace("__", "."): value for key, value in opts.items()}
    words = [str(word) for pair in keys.items() for word in pair]
    cfg = ["--cfg", str(ROOT / "configs/quadmamba_lite.yaml"), "--img-size", "32"]
    return [*cfg, *_once(list(map(str, flags))), "--opts", *words]


def _once(words: list[str]) -> list[str]:
    """Drop a flag and its value where the flag comes again."""
    for i, word in enumerate(words):
        if word == "--opts":
            break
        if word.startswith("--") and word in words[i + 1 :]:
            return _once(words[:i] + words[i + 2 :])
    return words


def run(*flags: object, **opts: object) -> int:
    """Run main in this process, in one thread; returns its exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main(arguments(*flags, **opts))
    finally:
        torch.set_num_threads(threads)


def passed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tests passed in a process of pytest, where none failed and none was skipped."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert "skipped" not in last, last
    found = re.search(r"(\d+) passed", last)
    assert found, last
    return int(found[1])


def in_a_fork(call: Callable, *args: object, timeout: float = 60) -> object:
    """What `call` returns or raises, in a fork of this process that may take `timeout` seconds."""
    ours, theirs = multiprocessing.Pipe()

    def body() -> None:
        try:
            theirs.send((call(*args), None))
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - raised again below
            theirs.send((None, f"{type(error).__name__}: {error}"))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    theirs.close()
    try:
        assert ours.poll(timeout), f"no answer within {timeout} s"
        result, error = ours.recv()
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return result


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command: list[str], *, inside: tuple[str, ...] = (), **env: object) -> subprocess.Popen:
    """Start python with `command` in the root of the project, one thread, no GPU.

    inside: a command that runs another one.
    """
    values = {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.Popen(
        [*inside, sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {key: str(value) for key, value in values.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(
    process: subprocess.Popen, timeout: float = 120, *, kill: bool = False
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; the process is stopped where it takes longer than `timeout`.

    kill: stop it at once.
    """
    if kill:
        process.kill()
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def start_ranks(command: list[str]) -> list[subprocess.Popen]:
    """Start `command` as two ranks of one run without a launcher."""
    port = free_port()
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    return [
        start(command, **common, MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank) for rank in (0, 1)
    ]


def two_ranks(command: list[str], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Run `command` as two ranks to the end."""
    return [finish(process, timeout) for process in start_ranks(command)]


def fill_up(path: Path) -> None:
    """Let the disk be full where `path` is written next, also in a run that is yet to begin."""
    partial, elsewhere = partial_of(path), path.parent / f"full-{path.name}"
    elsewhere.mkdir()
    (elsewhere / partial.name).symlink_to("/dev/full")
    partial.parent.symlink_to(elsewhere)


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """Within it, this process has a limit, one of resource.RLIMIT_*."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def files_of_at_most(size: int) -> AbstractContextManager[None]:
    """Within it, no file of this process can grow beyond so many bytes."""
    return limited(resource.RLIMIT_FSIZE, size)


def state_of(out: Path, tag: str = "default") -> dict[str, object]:
    """The last checkpoint of a run, without what tells where it ran."""
    path = out / "quadmamba_lite" / tag / "last.pth"
    payload = torch.load(path, weights_only=True)
    return {key: value for key, value in payload.items() if key not in ("config", "versions")}


def compare(a: object, b: object, name: str = "checkpoint") -> None:
    """Assert that two checkpoints hold the same values, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            compare(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b)):
            compare(x, y, f"{name}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    else:
        assert a == b, name
