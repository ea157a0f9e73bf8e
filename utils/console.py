"""The console: one that goes away, is full or cannot write a letter ends nothing."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from quadmamba.utils.files import OutputError

_LEFT = (errno.EPIPE, errno.EIO, errno.EBADF)  # of a reader, a terminal, a descriptor that has gone


class _Lasting(io.TextIOBase):
    """A stream that never fails: what cannot be printed any more is lost.

    error: why, where that is not simply that nobody reads it any more.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            self._print(text)
        except UnicodeEncodeError:
            letters = text.encode(self.encoding, "backslashreplace")
            self._print(letters.decode(self.encoding))
        return len(text)

    def _print(self, text: str) -> None:
        if self._stream is not None:
            with self._lasting():
                self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._lasting():
                self._stream.flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # full for the moment; what the buffer holds comes later
            pass
        except UnicodeEncodeError:
            raise
        except OSError as error:
            self._give_up()
            if error.errno not in _LEFT:
                self.error = error
        except ValueError:  # it was closed
            self._give_up()

    def _give_up(self) -> None:
        """Print to nowhere from now on, also what is still in buffers and what libraries print."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if stream.fileno() in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

    def isatty(self) -> bool:
        with contextlib.suppress(ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        return super().fileno() if self._stream is None else self._stream.fileno()


@contextmanager
def lasting_console() -> Iterator[None]:
    """Within it stdout and stderr may go away: the program goes on."""
    for descriptor in (0, 1, 2):  # one that is closed would be the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Lasting, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def fault() -> OSError | None:
    """Why stdout takes no more, None where it does or where its reader has simply left."""
    return getattr(sys.stdout, "error", None)


def check_printed() -> None:
    """For a program whose result is what it prints: see that stdout took it.

    Raises OutputError where it did not, for a full disk say; a reader that has left wanted no more.
    """
    sys.stdout.flush()
    error = fault()
    if error is not None:
        raise OutputError(f"cannot write the result to stdout: {error.strerror}") from error
