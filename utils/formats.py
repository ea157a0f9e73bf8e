"""Files of weights: the kind of a file by its content, its dict, and what is wrong with others.

Read are files of torch.save, both of today (a ZIP archive) and of before PyTorch 1.6, and
safetensors, whatever their names end in. Nothing in a file is executed.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import pickle
import pickletools
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import safetensors
import torch

from quadmamba.utils.kinds import describe

FORMAT = 2  # of our own checkpoints, under "format"
_SUM = b"sha256:"
_TAIL = 2 + len(_SUM) + 64  # length of the comment, then the comment
_CHUNK = 1 << 20
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_ZIP, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_LEGACY = (
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that a file before PyTorch 1.6 begins with
)
# What readers raise for bytes that were changed or cut off
_DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError, struct.error, zlib.error),
    *(zipfile.BadZipFile, safetensors.SafetensorError),
)
_ENDED = (EOFError, IndexError, struct.error)  # of these, for bytes that end too early


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used; the message says what to do."""


class _Dict:
    """Stands for a class or function that a pickle names: whatever the call, an empty dict."""

    def __new__(cls, *_: object) -> collections.OrderedDict:  # type: ignore[misc]
        """A dict of a kind that torch's reader lets a pickle fill."""
        return collections.OrderedDict()


class _List:
    """The same for one whose objects are filled as lists are."""

    def __new__(cls, *_: object) -> list:  # type: ignore[misc]
        """A list."""
        return []


class _Value:
    """The same for one whose objects take a state that is no dict, as NumPy's do."""

    def __new__(cls, *_: object) -> _Value:
        """An object without a value."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Leave the state out."""


def _stand_in(name: str) -> type:
    if name == "collections.deque":
        return _List
    return _Value if name.startswith("numpy.") else _Dict


def sum_comment(digest: hashlib._Hash) -> bytes:
    """The end of a file of ours: the length of the ZIP comment, and the comment."""
    comment = _SUM + digest.hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


def read(path: str | Path) -> dict[str, object]:
    """The dict in a file; a safetensors file gives its tensors under "model" (or "ema").

    Raises CheckpointError where there is no file, or where it is cut off, no checkpoint or holds
    more than tensors and plain values.
    """
    payload, foreign = read_foreign(path)
    if foreign:
        raise CheckpointError(
            f"{path} holds something else than tensors and plain values ({first(foreign)}); it was "
            "not loaded, since that can run code. Expected a checkpoint of this project"
        )
    return payload


def read_foreign(path: str | Path) -> tuple[dict[str, object], list[str]]:
    """As `read`, but of a file of any project: its dict, and the classes and functions it names.

    What these would make is read without its class, as mere dicts and lists.
    """
    path = Path(path)
    try:
        _check_file(path)
        with path.open("rb") as file:
            head = file.read(512)
        summed = _check_sum(path)
        if _is_safetensors(head):
            return _read_safetensors(path), []
        legacy = head[:1] == b"\x80" and _LEGACY in head[:32]
        if not legacy and not head.startswith(_ZIP):
            raise CheckpointError(_unlike(path, describe(head)))
        if not legacy:
            _check_archive(path, summed)
        unsafe = _unsafe_names(path, legacy)
        payload = _load(path, unsafe)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(payload).__name__}")
    if payload.get("format") == FORMAT and not (summed or legacy or _ends_plainly(path)):
        raise CheckpointError(f"{path} is damaged: its checksum is missing")
    if unsafe and not payload:
        raise CheckpointError(f"{path} {whole_object(unsafe)}")
    return payload, unsafe


def whole_object(names: list[str]) -> str:
    """What to say of a file that holds an object of one of these classes instead of weights."""
    return (
        f"holds a pickled object ({first(names)}), which only its code can read: expected its "
        "weights; where it was made, write them with torch.save(model.state_dict(), PATH)"
    )


def first(names: list[str], count: int = 4) -> str:
    """The first names in one line."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _unlike(path: Path, what: str) -> str:
    kind = "a safetensors file" if path.suffix == ".safetensors" else "a checkpoint"
    return f"{path} is not {kind}{what}"


def _cut_off(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a checkpoint, or it is cut off: it begins as one does, and its end is "
        f"missing after {path.stat().st_size} bytes; copy or download it again"
    )


def _damaged(path: Path, reason: object) -> CheckpointError:
    text = str(reason).rpartition("WeightsUnpickler error: ")[2].strip()
    line = text.partition("\n")[0] or type(reason).__name__
    return CheckpointError(f"{path} is damaged or not a checkpoint: {line}")


def _check_file(path: Path) -> None:
    """Raise CheckpointError where `path` is no regular file."""
    if re.match(r"[a-z0-9+]{2,}:/", str(path)):
        raise CheckpointError(f"no such checkpoint: {path} is an address; download it first")
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CheckpointError(f"no such checkpoint: {path}") from error
    if stat.S_ISDIR(mode):
        names = sorted(item.name for item in path.iterdir() if item.suffix in _SUFFIXES)
        inside = f"; give one of its files: {first(names)}" if names else ""
        raise CheckpointError(f"no such checkpoint: {path} is a folder, expected a file{inside}")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"no such checkpoint: {path} is no regular file")


def _check_sum(path: Path) -> bool:
    """Compare the checksum in the file with its bytes; False where it has none.

    Raises CheckpointError where they differ.
    """
    left = path.stat().st_size - _TAIL
    if left < 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(left)
        tail = file.read()
        if not tail[2:].startswith(_SUM):
            return False
        file.seek(0)
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    digest.update(b"\0\0")
    if tail != sum_comment(digest):
        raise CheckpointError(
            f"{path} is damaged: its bytes do not have the checksum that was written with them"
        )
    return True


def _check_archive(path: Path, summed: bool) -> None:
    """Raise CheckpointError for a ZIP archive that is damaged or not of torch.save."""
    try:
        if not zipfile.is_zipfile(path):
            raise _cut_off(path)
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
            if "data.pkl" not in names:
                arrays = all(name.endswith(".npy") for name in names)
                kind = "arrays of NumPy" if arrays else "an archive"
                raise _damaged(path, f"{kind} ({first(names)}), not of torch.save")
            if "constants.pkl" in names:
                raise CheckpointError(_unlike(path, _PROGRAM))
            if summed:
                return
            # Without a checksum of ours: those of the members, which torch does not compare
            if any(item.CRC for item in archive.infolist()) and (bad := archive.testzip()):
                raise _damaged(path, f"{bad} in it does not have the checksum written with it")
    except (*_DAMAGE, NotImplementedError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, error) from error


_PROGRAM = (
    ": it is a TorchScript program, which is code; write its weights with "
    "torch.save(torch.jit.load(PATH).state_dict(), OTHER)"
)


def _ends_plainly(path: Path) -> bool:
    """Whether nothing follows the directory of an archive: one of torch.save alone."""
    with path.open("rb") as file:
        file.seek(-22, io.SEEK_END)
        tail = file.read()
    return tail.startswith(_ZIP_END) and tail.endswith(b"\0\0")


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and head[4:8] == bytes(4)


def _read_safetensors(path: Path) -> dict[str, object]:
    """The tensors, and what `writer.write_weights` notes beside them."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or it is cut off: {error}"
        ) from error
    notes: dict[str, object] = {}
    for key in ("classes", "config"):
        try:
            notes[key] = json.loads(about.get(key, "null"))
        except (ValueError, RecursionError):  # another project's note
            notes[key] = None
    return {"ema" if about.get("weights") == "ema" else "model": state, **notes}


def _unsafe_names(path: Path, legacy: bool) -> list[str]:
    """Classes and functions that the pickle in a file names, beside those of tensors."""
    try:
        start, source = _legacy_pickle(path) if legacy else (_archived_pickle(path), path)
        if start in (b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(
                f"{path} was written with pickle protocol {start[1]}, which cannot be read "
                "without running its code: expected 2, the default of torch.save"
            )
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except (*_DAMAGE, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise (_cut_off(path) if legacy else _damaged(path, error)) from error


def _archived_pickle(path: Path) -> bytes:
    """How the pickle in an archive of torch.save begins, whatever the archive's checksums."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = next(item for item in archive.infolist() if item.filename.endswith("data.pkl"))
        file.seek(entry.header_offset + 26)  # lengths of the name and of the field after it
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
        return file.read(2)


def _legacy_pickle(path: Path) -> tuple[bytes, io.BytesIO]:
    """How the pickle of the dict begins in a file from before PyTorch 1.6, and an archive of it."""
    with path.open("rb") as file:
        for _ in range(4):  # three others come first
            start = file.tell()
            collections.deque(pickletools.genops(file), 0)
        length = file.tell() - start
        file.seek(start)
        content = file.read(length)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writing:
        writing.writestr("archive/data.pkl", content)
        writing.writestr("archive/version", "3")
    archive.seek(0)
    return content[:2], archive


def _load(path: Path, unsafe: list[str]) -> object:
    """What torch.load reads where each of the names has a stand-in."""
    try:
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in unsafe]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        if "EOF" in str(error) or isinstance(error, _ENDED):
            raise _cut_off(path) from error
        if not unsafe:
            raise _damaged(path, error) from error
        if any(name.startswith("torch.nn.modules.") for name in unsafe):
            raise CheckpointError(f"{path} {whole_object(unsafe)}") from error
        raise CheckpointError(
            f"{path} cannot be read without running its code ({first(unsafe)}); expected tensors "
            "and plain values"
        ) from error
