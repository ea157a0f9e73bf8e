"""Pictures of what the quad blocks do: the score of each token and the partition they choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from quadmamba.models.ss2d import QuadSS2D

GAP = 4  # pixels around each panel
_MIN_SIDE = 160  # smaller images are enlarged by a whole factor
_HEAT = (
    (0.10, 0.05, 0.35),
    (0.45, 0.10, 0.60),
    (0.90, 0.35, 0.35),
    (1.0, 0.75, 0.2),
    (1.0, 1.0, 0.8),
)
_COARSE_LINE, _FINE_LINE = (1.0, 1.0, 1.0), (1.0, 0.85, 0.0)
_DIM = 0.45  # brightness of the quadrants that are not selected


@dataclass(frozen=True)
class BlockView:
    """What one quad block does with a batch on its h x w grid.

    name: where the block is. score: (b, h, w). window: (b, h, w) the window in which each token is
    scanned: 0..3 a quadrant that is not selected, 4..7 a sub-window of the selected one.
    """

    name: str
    score: Tensor
    window: Tensor


def quad_blocks(model: nn.Module) -> dict[str, QuadSS2D]:
    """The token mixers that choose a partition, by name, in the order of the forward pass."""
    blocks = {}
    for path, module in model.named_modules():
        if isinstance(module, QuadSS2D):
            stage, block = (int(part) + 1 for part in path.split(".")[-3:-1])  # stages.0.1.op
            blocks[f"stage {stage} block {block}{', shifted' if module.sign else ''}"] = module
    return blocks


@torch.no_grad()
def block_views(model: nn.Module, images: Tensor) -> list[BlockView]:
    """What each quad block does with images (b, 3, H, W) in eval mode; the modes are restored."""
    blocks, scores = quad_blocks(model), {}
    hooks = [
        op.predictor.register_forward_hook(lambda *call, name=name: scores.update({name: call[2]}))
        for name, op in blocks.items()
    ]
    try:
        with _eval_mode(model):
            model(images)
            return [
                BlockView(name, scores[name], window_map(op, scores[name]))
                for name, op in blocks.items()
            ]
    finally:
        for hook in hooks:
            hook.remove()


def window_map(op: QuadSS2D, score: Tensor) -> Tensor:
    """Window of each token (see `BlockView`) that `op` chooses from scores (b, h, w)."""
    h, w = score.shape[1:]
    shift = op.shift(h, w)
    quadrant = op.order.maps(h, w, shift, score.device).quadrant.long().view(h, w)
    rows = _second_quarter((torch.arange(h, device=score.device) + shift[0]) % h, h)
    columns = _second_quarter((torch.arange(w, device=score.device) + shift[1]) % w, w)
    sub_window = 2 * rows[:, None] + columns  # (h, w)
    selected = op.decide(score).argmax(-1)[:, None, None]
    return torch.where(quadrant == selected, 4 + sub_window, quadrant)


def _second_quarter(place: Tensor, side: int) -> Tensor:
    """1 where a place on a side is in the second half of its half; odd first halves are longer."""
    first = (side + 1) // 2
    second = (place >= first).long()
    length = torch.where(second == 1, side - first, first)
    return (place - first * second >= (length + 1) // 2).long()


def partition_images(model: nn.Module, images: Tensor) -> Tensor:
    """One picture of each image: normalised (b, 3, H, W) -> (b, 3, H', W') in [0, 1] on the CPU.

    Columns: the image, then each quad block. Upper row: scores, from dark (lowest) to light
    (highest). Lower row: partition, the selected quadrant bright and cut in four. Images smaller
    than 160 pixels are enlarged. A model without quad blocks gives the images alone.
    """
    views = block_views(model, images)
    mean, std = (
        torch.tensor(v, device=images.device).view(3, 1, 1)
        for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    base = (images.float() * std + mean).clamp(0, 1)
    factor = -(-_MIN_SIDE // min(base.shape[2:]))
    base = base.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if not views:
        return base.cpu()
    upper = [base] + [_score_panel(base, view.score) for view in views]
    lower = [base] + [_partition_panel(base, view.window) for view in views]
    rows = [torch.cat([F.pad(panel, [GAP] * 4) for panel in row], 3) for row in (upper, lower)]
    return torch.cat(rows, 2).cpu()


def _score_panel(base: Tensor, score: Tensor) -> Tensor:
    """Scores (b, h, w) as colours over the grey image (b, 3, H, W)."""
    low, high = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
    level = ((score - low) / (high - low)).nan_to_num(0) * (len(_HEAT) - 1)
    heat = torch.tensor(_HEAT, device=base.device, dtype=base.dtype)
    step = level.long().clamp(max=len(_HEAT) - 2)
    part = (level - step).to(base.dtype)[..., None]
    colour = (heat[step] * (1 - part) + heat[step + 1] * part).permute(0, 3, 1, 2)  # (b, 3, h, w)
    return 0.35 * base.mean(1, keepdim=True) + 0.65 * F.interpolate(colour, base.shape[2:])


def _partition_panel(base: Tensor, window: Tensor) -> Tensor:
    """Windows (b, h, w) outlined on the image (b, 3, H, W), the unselected ones dimmed."""
    window = F.interpolate(window[:, None].to(base.dtype), base.shape[2:])  # (b, 1, H, W)
    panel = torch.where(window >= 4, base, _DIM * base)
    quadrant = window.clamp(max=4)  # the selected one as a whole
    for labels, colour in ((window, _FINE_LINE), (quadrant, _COARSE_LINE)):
        line = torch.tensor(colour, device=base.device, dtype=base.dtype).view(3, 1, 1)
        panel = torch.where(_borders(labels), line, panel)
    return panel


def _borders(labels: Tensor) -> Tensor:
    """Pixels (b, 1, H, W) within a line's width of another label."""
    width = 2 * (min(labels.shape[2:]) // 320) + 1
    highest = F.max_pool2d(labels, 3, 1, 1)
    lowest = -F.max_pool2d(-labels, 3, 1, 1)
    return F.max_pool2d((highest != lowest).to(labels.dtype), width, 1, width // 2) > 0


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, then each back in its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
