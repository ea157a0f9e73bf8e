"""Waits that end: for something that makes progress, and only as long as it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from quadmamba.data.images import DataError, shown

Result = TypeVar("Result")
_SLICE_S = 1.0


class LoaderError(DataError):
    """Images or batches do not come: what reads them died, stalled or cannot be started.

    The files may be sound.
    """


class Patience:
    """Counts the seconds without progress, up to `timeout`.

    They are counted in slices, of which one takes two at most: a job that was suspended meanwhile
    has not waited. slice_s: how often `is_over` is to be asked.
    """

    def __init__(self, timeout: float) -> None:
        self.slice_s = min(_SLICE_S, timeout / 4)
        self._timeout, self._waited = timeout, 0.0
        self._mark: object = None
        self._asked = time.monotonic()

    def is_over(self, mark: object) -> bool:
        """Whether `mark`, which changes with each bit of progress, has stayed for too long."""
        now = time.monotonic()
        self._waited += min(now - self._asked, 2 * self.slice_s)
        self._asked = now
        if mark != self._mark:
            self._mark, self._waited = mark, 0.0
        return self._waited >= self._timeout


class Caught:
    """Keeps what a block raises as `error`, to be raised at another place."""

    error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error
        return True


Tell = Callable[[str], None]  # told of each folder


def within(timeout: float, root: str, call: Callable[[Tell], Result]) -> Result:
    """The result of `call(tell)`, which tells each folder at and below `root` that it looks into.

    It runs in a thread, which is left behind where it does not answer. Raises LoaderError where it
    tells nothing for `timeout` seconds, and what it raises itself.
    """
    told, results, caught = [root], [], Caught()

    def body() -> None:
        with caught:
            results.append(call(told.append))

    thread, patience = threading.Thread(target=body, name="folders", daemon=True), Patience(timeout)
    try:
        thread.start()
    except RuntimeError as error:
        raise LoaderError(f"cannot list {shown(root)}: {error} (ulimit -u)") from error
    while thread.is_alive():
        thread.join(patience.slice_s)
        if patience.is_over(len(told)) and thread.is_alive():
            raise LoaderError(
                f"listing {shown(told[-1])} has taken {timeout:g} s (DATA.TIMEOUT)\nLook whether "
                "the disk or network share answers; raise DATA.TIMEOUT where one folder may take "
                "that long."
            )
    if caught.error is not None:
        raise caught.error
    return results[0]
