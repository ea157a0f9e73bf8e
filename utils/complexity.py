"""Parameters and multiply-adds of a model, counted on the CPU in the official convention.

fvcore counts one multiply-add as one; the scan, which fvcore cannot see, adds the official code's
9·b·l·d·n + b·d·l for each route, and b·l·d·r for the expansion of its step size.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from quadmamba.models import QuadMamba
from quadmamba.models.ss2d import ScanParameters


@dataclass(frozen=True)
class Complexity:
    """params: parameters. gmacs: 10^9 multiply-adds of one img_size x img_size image.

    parts: the same two numbers for each part of the model.
    """

    params: int
    gmacs: float
    img_size: int
    parts: dict[str, tuple[int, float]]

    def table(self) -> str:
        """Text table, a line for each part and the total."""
        rows = [*self.parts.items(), ("total", (self.params, self.gmacs))]
        lines = [f"{'part':<10} {'params (M)':>10} {'GMACs':>9}"]
        lines += [
            f"{name:<10} {params / 1e6:>10.3f} {gmacs:>9.3f}" for name, (params, gmacs) in rows
        ]
        lines.append(
            f"one {self.img_size}x{self.img_size} image; fvcore + 9·b·l·d·n + b·d·l per scan"
        )
        return "\n".join(lines)


@contextmanager
def one_thread() -> Iterator[None]:
    """Do small work by one thread: on a busy machine several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(model: QuadMamba, img_size: int) -> Complexity:
    """Count `model` on one img_size x img_size image; the model itself is left as it is."""
    model = _empty_copy(model).eval()
    parts = {"stem": [model.stem]}
    for i, stage in enumerate(model.stages):
        parts[f"stage {i + 1}"] = [stage, *([model.downsamples[i - 1]] if i else [])]
    parts["head"] = [model.head]
    macs = _count(model, img_size)
    names = {module: name for name, module in model.named_modules()}
    sizes = {
        name: (
            sum(p.numel() for module in modules for p in module.parameters()),
            sum(macs[names[module]] for module in modules) / 1e9,
        )
        for name, modules in parts.items()
    }
    params = sum(p.numel() for p in model.parameters())
    return Complexity(params, macs[""] / 1e9, img_size, sizes)


def _empty_copy(model: QuadMamba) -> QuadMamba:
    """The model on the CPU, in float32, with weights of 0: only their shapes count."""
    weights = {
        id(old): nn.Parameter(torch.zeros_like(old, device="cpu", dtype=torch.float32))
        for old in model.parameters()
    }
    return deepcopy(model, weights).cpu().float()


def _count(model: QuadMamba, img_size: int) -> Counter[str]:
    """Multiply-adds of one image by module name; "" is the whole model."""
    image = torch.zeros(1, model.in_chans, img_size, img_size)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with (
        _scans_by_formula(model) as scans,
        one_thread(),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        counted = FlopCountAnalysis(model, image).by_module()
        macs = Counter({name: int(count) for name, count in counted.items()})
    for name, count in scans.items():
        for end in [0, *(i for i, c in enumerate(name) if c == "."), len(name)]:
            macs[name[:end]] += count
    return macs


@contextmanager
def _scans_by_formula(model: nn.Module) -> Iterator[Counter[str]]:
    """Replace every scan by its formula; the counter fills with multiply-adds by module name."""
    counts: Counter[str] = Counter()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, ScanParameters)}

    def stand_in(name: str, x: Tensor, *inputs: Tensor) -> Tensor:
        """Count a scan of x and pass x on."""
        counts[name] = int(modules[name].macs(int(x.shape[1])))
        return x + sum(t.mean() for t in inputs)  # what is not used would not be counted

    for name, module in modules.items():
        module.scan = lambda x, proj, *_, name=name: stand_in(name, x, proj)
        module.quadtree_scan = lambda *inputs, name=name: stand_in(name, *inputs[:3])
    try:
        yield counts
    finally:
        for module in modules.values():
            del module.scan, module.quadtree_scan
