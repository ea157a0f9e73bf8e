"""Random generators of a process: seeded by the place of a step, saved and set again.

Every random number of a training step comes from (seed, epoch, step, rank), so a run that is
continued draws the same ones. The states are in a checkpoint nevertheless: they cover what draws
between two steps. The Gumbel noise of the models and their stochastic depth draw from torch's
generator of the device.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPU) for one training step of one rank."""
    words = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def rng_state(device: torch.device) -> dict[str, object]:
    """The states of Python's, NumPy's and torch's generators, as tensors and plain values.

    cuda: of the GPU `device`, None on a CPU.
    """
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: Mapping, device: torch.device) -> None:
    """Take the states that `rng_state` gave; those of another kind of device are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
