"""Writing checkpoints: whole files only, the older ones kept, in a thread beside the training."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from quadmamba.utils.checkpoint import LAST, better_weights
from quadmamba.utils.files import clear_partial, partial_of, put, reason
from quadmamba.utils.formats import CheckpointError, sum_comment
from quadmamba.utils.lock import FolderLock

__all__ = ["CheckpointWriter", "holding", "partial_of", "save", "save_alone", "save_file"]
_LEAVE_S = 5.0  # how long the end of a run waits for a checkpoint that is being written


class _Hashing:
    """A file to write to that keeps the checksum of what was written.

    error: what the disk said where it took no more; torch.save tells something else.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write and count in."""
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Pass on what the file holds back."""
        self.file.flush()


def write_checkpoint(path: Path, payload: Mapping[str, object]) -> None:
    """Write `payload` as torch.save does, with the checksum of the file in its ZIP comment."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(dict(payload), hashing)
        except RuntimeError as error:
            raise hashing.error or error from None
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
    try:
        safetensors.torch.save_file(state, path, texts)
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from None
    with contextlib.suppress(PermissionError):  # a file system without permissions
        path.chmod(mode)


def write_weights(path: Path, payload: Mapping[str, object]) -> None:
    """Write the weights of `payload` that validated better, with what `formats.read` notes."""
    name = better_weights(payload)
    keys = ("epoch", "updates", "classes", "config")
    about = {"weights": name} | {key: payload[key] for key in keys if key in payload}
    write_tensors(path, payload[name], about)


def save_file(path: Path, write: Callable[[Path], object], *, need: int = 0) -> None:
    """Let `write` make a file of any kind, so that `path` is the old file or the whole new one.

    need: its bytes, where they are known. Raises CheckpointError where the folder or the disk does
    not take it, or `path` is no file.
    """
    try:
        taken = path.exists() and not path.is_file()
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    if taken:
        kind = "a folder" if path.is_dir() else "no regular file"
        raise CheckpointError(f"cannot write {path}: there is {kind} of this name; move it away")
    _put(path, write, need=need)


def save_alone(path: Path, payload: Mapping[str, object]) -> None:
    """Write a dict of weights so that `path` is the old file or the whole new one.

    Raises CheckpointError where the folder or the disk does not take it.
    """
    need = _bytes(payload)
    save_file(path, lambda partial: write_checkpoint(partial, payload), need=need)


def save(path: Path, payload: Mapping[str, object], *, keep: int = 1) -> None:
    """Write a checkpoint and, beside it, its weights as .safetensors.

    At any moment each file is the old one or the whole new one. keep: how many files of the name
    stay, the older ones as NAME.1.pth, NAME.2.pth and so on.
    Raises CheckpointError where the folder or the disk does not take it; the files before are then
    kept.
    """
    need = _bytes(payload)
    _put(path, lambda partial: write_checkpoint(partial, payload), need=need, keep=keep)
    need = _bytes(payload[better_weights(payload)])
    weights = path.with_suffix(".safetensors")
    _put(weights, lambda partial: write_weights(partial, payload), need=need)


def copy_with_weights(source: Path, path: Path) -> None:
    """Copy a checkpoint and the weights beside it, each whole or not at all.

    Raises CheckpointError where the disk does not take them.
    """
    for end in (source.suffix, ".safetensors"):
        file, target = source.with_suffix(end), path.with_suffix(end)
        if file.exists():
            size = file.stat().st_size
            _put(target, lambda partial, file=file: shutil.copyfile(file, partial), need=size)


def _put(path: Path, write: Callable[[Path], object], *, need: int = 0, keep: int = 1) -> None:
    """`files.put`, with CheckpointError for whatever fails. need: bytes of the file, if known."""
    try:
        put(path, write, keep=keep)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        told = isinstance(error, OSError)
        why = reason(error, path.parent, need) if told else f"{error}"
        kept = "; the file before is kept" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {why}{kept}") from error


def _bytes(tree: object) -> int:
    """The size of the tensors in nested containers."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return sum(map(_bytes, tree)) if isinstance(tree, list | tuple) else 0


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


class CheckpointWriter:
    """Writes checkpoints to `folder` in a thread; one at a time, the next one waits for it.

    keep: number of last checkpoints that stay. lock: of the folder; nothing is written once it is
    lost. Costs host memory for one checkpoint. What a killed process left half written in the
    folder is removed.
    """

    def __init__(self, folder: Path, *, keep: int, lock: FolderLock | None = None) -> None:
        self._folder, self._keep, self._lock = folder, keep, lock
        clear_partial(folder)
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot = _Snapshot()
        self._pending: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """True where the last checkpoint could not be written, or the next one may not be; `wait`
        says why.
        """
        done = self._pending is not None and self._pending.done()
        lost = self._lock is not None and bool(self._lock.lost)
        return lost or done and self._pending.exception() is not None

    def finish(self, seconds: float | None = None) -> bool:
        """Wait for the checkpoint under way, at most so long; whether all is written or failed."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending], seconds)
        return not self.busy

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
            self._check_lock()
            try:
                save(self._folder / name, payload, keep=self._keep if name == LAST else 1)
            except CheckpointError as error:
                last = self._folder / LAST
                then = f"goes on from {last}" if last.exists() else "begins anew"
                raise CheckpointError(
                    f"{error}\nOnce there is room the same command {then}"
                ) from error

    def _check_lock(self) -> None:
        if self._lock is not None and self._lock.lost:
            raise CheckpointError(
                f"nothing more is written to {self._folder}: this process gave no sign of life for "
                f"a while, and the folder went to {self._lock.lost}"
            )

    def wait(self) -> None:
        """Wait until all is written. Raises CheckpointError where that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        self._check_lock()


@contextmanager
def holding(folder: Path, *, keep: int) -> Iterator[CheckpointWriter]:
    """A writer to `folder`, to which no other process writes until this one has done.

    Raises OutputError where another one holds the folder, or where it cannot be written.
    """
    lock = FolderLock(folder)
    writer = CheckpointWriter(folder, keep=keep, lock=lock)
    try:
        yield writer
    finally:
        if writer.finish(_LEAVE_S):  # else the folder stays locked until the process has written
            lock.release()
