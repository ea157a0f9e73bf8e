"""Randomness that depends on named keys only, and leaves the global generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (CPU) from `keys` inside the block, then restore all three.

    The same keys give the same numbers in any process; `seeded(0, 1)` and `seeded(1, 0)` differ.
    The generators of GPUs are not touched. NumPy's functions draw from another generator inside
    the block, PCG64, as copying the state of the usual one out and in takes longer than a crop.
    """
    states = random.getstate(), np.random.get_bit_generator(), torch.default_generator.get_state()
    sequence = np.random.SeedSequence([key % 2**64 for key in keys])
    seeds = sequence.generate_state(2)
    try:
        random.seed(int(seeds[0]))
        np.random.set_bit_generator(np.random.PCG64(sequence))
        torch.default_generator.manual_seed(int(seeds[1]))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.default_generator.set_state(states[2])
