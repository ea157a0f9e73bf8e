"""Memory for batches that this process shares with the workers that it forks."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import torch

from quadmamba.data.patience import LoaderError


class Slots:
    """Memory for `slots` batches of up to `size` images of `side` squared, shared with workers.

    images: bytes (slots, size, side, side, 3). draws: (slots, size, 2), what to read. begun:
    (readers, 2), how often each reader went on, and the number of the image it reads, or -1.
    """

    def __init__(self, slots: int, size: int, side: int, readers: int) -> None:
        shapes = ((readers, 2), (slots, size, 2))
        words = [8 * int(np.prod(shape)) for shape in shapes]
        pixels = (slots, size, side, side, 3)
        self._memory = mmap.mmap(-1, sum(words) + int(np.prod(pixels)))
        self.begun = np.ndarray(shapes[0], np.int64, self._memory)
        self.draws = np.ndarray(shapes[1], np.int64, self._memory, words[0])
        self.images = torch.from_numpy(np.ndarray(pixels, np.uint8, self._memory, sum(words)))
        self.begun[:, 1] = -1
        self.over = False  # for a reader in this process
        self._locked = False

    def note(self, reader: int, index: int) -> None:
        """Show what a reader is about to read."""
        self.begun[reader] = self.begun[reader, 0] + 1, index

    def lock(self) -> None:
        """Page-lock the images for copies to a GPU. Raises LoaderError where that is refused."""
        code = torch.cuda.cudart().cudaHostRegister(self.images.data_ptr(), self.images.nbytes, 0)
        if int(code):
            raise LoaderError(
                f"DATA.PIN_MEMORY: cannot page-lock {self.images.nbytes / 1e6:.0f} MB for batches "
                f"(CUDA error {int(code)}: {torch.cuda.cudart().cudaGetErrorString(code)}); "
                "DATA.PIN_MEMORY False does without"
            )
        self._locked = True

    def unlock(self) -> None:
        """Undo `lock`, once all copies are done."""
        if self._locked:
            self._locked = False
            with suppress(RuntimeError):  # after an error on the GPU
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(self.images.data_ptr())
