"""The lock of a folder: one process at a time writes there, and the next one is told who does.

The file `run.lock` names its holder. On one machine, containers included, the kernel decides: it
keeps the file locked (flock) as long as the holder lives and not longer, whatever ended it. Another
machine may share the file but not such locks, or keep the lock of one that has gone. There the beat
decides: a holder touches its file every 5 s, and one that has not for 30 s is taken for dead; who
waits for that sees it with a clock of its own. A holder that was taken for dead and comes back
finds another name in the file and writes nothing more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from quadmamba.utils.files import OutputError, reason

LOCK = "run.lock"
_BEAT_S, _SILENCE_S = 5.0, 30.0
_POLL_S = 0.2
_PATIENCE_S = 2.0  # for a holder that was just killed to go, or that just came to say who it is
_COMMAND = 200  # letters of a command that are told
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[FolderLock] = set()  # of this process; a child that it forks lets go of them


class FolderLock:
    """Holds `folder`, which is made where it is missing, until `release` or the process ends.

    Raises OutputError where another process holds it, or where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": shlex.join(sys.orig_argv)[:_COMMAND],
            "machine": _machine(),
            "token": uuid.uuid4().hex,
        }
        self._taken_by: Mapping[str, object] = {}
        self._has_locks = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"OUTPUT: expected a folder that can be written, got {folder}: "
                f"{reason(error, folder)}; choose another with --output"
            ) from error
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        _watch_forks()
        _held.add(self)
        if not self._has_locks:
            sys.stderr.write(
                f"the file system of {folder} has no locks: a run that was killed there is noticed "
                f"after {_SILENCE_S:.0f} s\n"
            )

    @property
    def lost(self) -> str:
        """Who took the folder while this process gave no sign of life; "" for nobody."""
        return _words(self._taken_by) if self._taken_by else ""

    def release(self) -> None:
        """Let the next one in."""
        self._over.set()
        self._thread.join()
        _held.discard(self)
        with contextlib.suppress(OSError):
            if not self._taken_by and _is_at(self._file, self._path):
                self._path.unlink()
            fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)

    def close_in_child(self) -> None:
        """In a process that was forked off: it holds nothing, so it keeps nobody out."""
        os.close(self._file)

    def _take(self) -> int:
        """The file, locked and with the name of this process in it."""
        silent = _Silence()
        while True:
            file, new = _open(self._path)
            try:
                if self._is_free(file, new, silent):
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(self._me).encode(), 0)
                    os.fsync(file)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
            time.sleep(_POLL_S)

    def _is_free(self, file: int, new: bool, silent: _Silence) -> bool:
        """Whether this process may hold the open file. Raises OutputError where another one does.

        False: look again in a moment.
        """
        locked = _lock(file)
        self._has_locks = locked is not None
        if not _is_at(file, self._path):  # its holder removed it when it had done
            return False
        holder = {} if new else _read(file)
        if locked is None:
            return new or self._has_died(file, holder, silent)
        if holder.get("machine", self._me["machine"]) != self._me["machine"]:
            dead = self._has_died(file, holder, silent)
            if dead and not locked:  # a server keeps its lock: a new file is free
                self._path.unlink()
            return dead and locked
        if locked:
            return True
        if silent.lasts("local", _PATIENCE_S):
            raise OutputError(self._refusal(holder))
        return False

    def _has_died(self, file: int, holder: Mapping[str, object], silent: _Silence) -> bool:
        """Whether `holder` has been silent for too long. Raises OutputError where it lives."""
        beat = f"{os.fstat(file).st_mtime_ns} {holder}"
        if not silent.beat:
            sys.stderr.write(
                f"{self._folder} was left to {_words(holder)}; looking for a sign of life for "
                f"{_SILENCE_S:.0f} s\n"
            )
        elif beat != silent.beat:
            raise OutputError(self._refusal(holder))
        return silent.lasts(beat, _SILENCE_S)

    def _refusal(self, holder: Mapping[str, object]) -> str:
        return (
            f"OUTPUT: {self._folder} is in use by {_words(holder)}\n"
            "Two runs in one folder would overwrite each other: stop that one, or give this one a "
            f"folder of its own with --tag (or --output). The lock is {self._path}"
        )

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_S):
            with contextlib.suppress(OSError, ValueError):  # a disk away, a name half written
                os.utime(self._file)
                found = json.loads(self._path.read_bytes())
                if found != self._me:
                    self._taken_by = found
                    return


class _Silence:
    """How long a holder has shown the same beat, by the clock of who looks."""

    def __init__(self) -> None:
        self.beat = ""
        self._since = time.monotonic()

    def lasts(self, beat: str, seconds: float) -> bool:
        """Whether `beat` has been seen for so long."""
        if beat != self.beat:
            self.beat, self._since = beat, time.monotonic()
        return time.monotonic() - self._since >= seconds


def _open(path: Path) -> tuple[int, bool]:
    """The open lock file, and whether this call made it."""
    flags = os.O_RDWR | os.O_CLOEXEC
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        with contextlib.suppress(FileNotFoundError):  # released in between
            return os.open(path, flags), False


def _lock(file: int) -> bool | None:
    """Lock the file; False where somebody else has it, None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, object]:
    """The holder in a lock file; {} where it has not yet written who it is."""
    try:
        holder = json.loads(os.pread(file, 1 << 16, 0))
    except (ValueError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _words(holder: Mapping[str, object]) -> str:
    if not holder:
        return "another process"
    return "process {pid} on {host} since {since}: {command}".format(
        **{key: holder.get(key, "?") for key in ("pid", "host", "since", "command")}
    )


def _machine() -> str:
    """A name of the running kernel: containers on one machine share it, a reboot changes it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for lock in _held:
        lock.close_in_child()
    _held.clear()
