"""Signals that ask a run to save and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A terminal and a launcher may both pass on one and the same signal
_ECHO_S = 1.0


class StopRequest:
    """Inside the block the first of SIGNALS sets `received`; a second one ends the process at once.

    received: the number of the signal, 0 before. What comes within a second of the first one is
    taken as its echo. A thread of its own reads the signals, so that the second one works also
    where the main thread waits for another rank. The exit code is then 128 + its number.
    SIGHUP, of a terminal that went away, is nobody's impatience: as a second one it does nothing,
    and where the process was started to ignore it (nohup) it does nothing at all.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopRequest:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        hang_up = signal.getsignal(signal.SIGHUP)
        asked = [n for n in SIGNALS if n != signal.SIGHUP or hang_up != signal.SIG_IGN]
        self._before = {number: signal.signal(number, _nothing) for number in asked}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        since = 0.0
        while number := os.read(self._read, 1)[0]:
            if number not in SIGNALS:  # such as that of a child that ended
                continue
            late = self.received and time.monotonic() - since > _ECHO_S
            if late and number != signal.SIGHUP:
                os._exit(128 + number)
            if not self.received:
                since, self.received = time.monotonic(), number


def _nothing(number: int, frame: object) -> None:
    """Keep the default action from happening; the thread does the rest."""
    del number, frame
