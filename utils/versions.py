"""What computes: versions of the libraries, and the commit of this code."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

import quadmamba

_ROOT = Path(__file__).parents[1]


@cache
def versions() -> dict[str, str]:
    """Versions by name; commit is "unknown" where the code is not in a git checkout of its own."""
    return {
        "quadmamba": quadmamba.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "torchvision": str(torchvision.__version__),
        "timm": str(timm.__version__),
        "numpy": str(np.__version__),
        "commit": _commit(),
    }


def _commit() -> str:
    if not (_ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
