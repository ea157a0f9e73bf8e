"""Writing checkpoints: whole files only, the older ones kept, in a thread beside the training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from quadmamba.utils.checkpoint import LAST, better_weights, older
from quadmamba.utils.formats import CheckpointError, sum_comment


class _Hashing:
    """A file to write to that keeps the checksum of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and count in."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Pass on what the file holds back."""
        self.file.flush()


def write_checkpoint(path: Path, payload: Mapping[str, object]) -> None:
    """Write `payload` as torch.save does, with the checksum of the file in its ZIP comment."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        torch.save(dict(payload), hashing)
        file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
        file.write(sum_comment(hashing.digest))


def write_tensors(path: Path, state: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write tensors as safetensors; `about` are its metadata, what is no text as JSON.

    By name: in memory it would hold up the other threads. The library writes another file beside
    `path`, for the owner alone, and renames it: the permissions are set as for any new file.
    """
    state = {key: value.contiguous() for key, value in state.items()}
    path.touch()
    mode = path.stat().st_mode
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    safetensors.torch.save_file(state, path, texts)
    with contextlib.suppress(PermissionError):  # a file system without permissions
        path.chmod(mode)


def write_weights(path: Path, payload: Mapping[str, object]) -> None:
    """Write the weights of `payload` that validated better, with what `formats.read` notes."""
    name = better_weights(payload)
    keys = ("epoch", "updates", "classes", "config")
    about = {"weights": name} | {key: payload[key] for key in keys if key in payload}
    write_tensors(path, payload[name], about)


def save_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file of any kind, so that `path` is the old file or the whole new one.

    Raises CheckpointError where the folder or the disk does not take it, or `path` is no file.
    """
    try:
        taken = path.exists() and not path.is_file()
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    if taken:
        kind = "a folder" if path.is_dir() else "no regular file"
        raise CheckpointError(f"cannot write {path}: there is {kind} of this name; move it away")
    _replace(path, write, 1)


def save_alone(path: Path, payload: Mapping[str, object]) -> None:
    """Write a dict of weights so that `path` is the old file or the whole new one.

    Raises CheckpointError where the folder or the disk does not take it.
    """
    save_file(path, lambda partial: write_checkpoint(partial, payload))


def save(path: Path, payload: Mapping[str, object], *, keep: int = 1) -> None:
    """Write a checkpoint and, beside it, its weights as .safetensors.

    At any moment each file is the old one or the whole new one. keep: how many files of the name
    stay, the older ones as NAME.1.pth, NAME.2.pth and so on.
    Raises CheckpointError where the folder or the disk does not take it; the files before are then
    kept.
    """
    _replace(path, lambda partial: write_checkpoint(partial, payload), keep)
    _replace(path.with_suffix(".safetensors"), lambda part: write_weights(part, payload), 1)


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its place: alone in a folder, so that whatever a
    killed process or a library leaves there can be removed at once.
    """
    return path.with_name(f".{path.name}.partial") / path.name


def _replace(path: Path, write: Callable[[Path], object], keep: int) -> None:
    partial = partial_of(path)
    try:
        partial.parent.mkdir(exist_ok=True)
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        for number in range(keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                older(path, number - 1).replace(older(path, number))
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; the file before is kept") from error
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


class _Snapshot:
    """Copies of nested tensors in host memory, which the next snapshot uses again.

    Copies from a GPU run in the stream of the training: what follows there waits for them, and
    nobody else does until `ready`.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}
        self._event: torch.cuda.Event | None = None

    def take(self, tree: object, key: tuple = ()) -> object:
        """A copy of `tree`; plain values are taken as they are."""
        if isinstance(tree, Mapping):
            return {name: self.take(value, (*key, name)) for name, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [self.take(value, (*key, i)) for i, value in enumerate(tree)]
        return self._copy(tree, key) if isinstance(tree, Tensor) else tree

    def _copy(self, value: Tensor, key: tuple) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[key] = buffer
        buffer.copy_(value.detach(), non_blocking=True)
        if value.is_cuda and self._event is None:
            self._event = torch.cuda.Event()
        return buffer

    def mark(self) -> None:
        """Note where in the stream the copies end."""
        if self._event is not None:
            self._event.record()

    def ready(self) -> None:
        """Wait for the copies."""
        if self._event is not None:
            self._event.synchronize()


def _give_way() -> None:
    """Let the training go first where there are fewer cores than threads (each has a priority)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class CheckpointWriter:
    """Writes checkpoints to `folder` in a thread; one at a time, the next one waits for it.

    keep: number of last checkpoints that stay. Costs host memory for one checkpoint. What a killed
    process left half written in the folder is removed.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        for left in folder.glob(partial_of(Path("*")).parent.name):
            shutil.rmtree(left, ignore_errors=True)
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_give_way)
        self._snapshot = _Snapshot()
        self._pending: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """True where the last checkpoint could not be written; `wait` says why."""
        done = self._pending is not None and self._pending.done()
        return done and self._pending.exception() is not None

    def submit(self, payload: Mapping[str, object], names: Sequence[str]) -> None:
        """Copy `payload` and write it under each of `names` later.

        Raises CheckpointError where the one before could not be written.
        """
        self.wait()
        copy = self._snapshot.take(payload)
        self._snapshot.mark()
        self._pending = self._pool.submit(self._write, copy, tuple(names))

    def _write(self, payload: Mapping[str, object], names: Sequence[str]) -> None:
        self._snapshot.ready()
        for name in names:
            save(self._folder / name, payload, keep=self._keep if name == LAST else 1)

    def wait(self) -> None:
        """Wait until all is written. Raises CheckpointError where that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
