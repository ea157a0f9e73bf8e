"""Curves and pictures for TensorBoard, written at once and by the calling thread.

PyTorch's SummaryWriter hands events to a thread, which holds them back for up to two minutes, so
that a killed run loses them, and which dies with a traceback of its own on a full disk.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import image, scalar

_PREFIX = "events.out.tfevents."


class Board:
    """A file of events in `folder`, which TensorBoard reads after those that are there.

    purge: the step from which on TensorBoard forgets what the files before hold; None for none.
    Every call may raise OSError.
    """

    def __init__(self, folder: Path, purge: int | None = None) -> None:
        # TensorBoard reads files in the order of the times in their names
        times = [path.name.removeprefix(_PREFIX)[:10] for path in folder.glob(f"{_PREFIX}*")]
        now = max([int(time.time()), *(int(text) + 1 for text in times if text.isdigit())])
        path = folder / f"{_PREFIX}{now:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"), 0)
        if purge is not None:
            self._add(Event(session_log=SessionLog(status=SessionLog.START)), purge)

    def _add(self, event: Event, step: int, at: float | None = None) -> None:
        event.step, event.wall_time = step, time.time() if at is None else at
        self._records.write(event.SerializeToString())

    def scalars(self, values: Mapping[str, float], step: int, at: float | None = None) -> None:
        """Points of curves, by name; at: their time, now where there is none."""
        points = [scalar(name, value).value[0] for name, value in values.items()]
        if points:
            self._add(Event(summary=Summary(value=points)), step, at)

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Pictures (n, 3, h, w) in [0, 1]."""
        self._add(Event(summary=image(name, images, dataformats="NCHW")), step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
