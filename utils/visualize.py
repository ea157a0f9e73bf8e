"""Pictures of the score of each token and of the partition that the quad blocks choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from quadmamba.utils.views import BlockView, block_views

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


def partition_images(model: nn.Module, images: Tensor) -> Tensor:
    """One picture of each image: normalised (b, 3, H, W) -> (b, 3, H', W') in [0, 1] on the CPU.

    Columns: the image, then each quad block. Upper row: scores, from dark (lowest) to light
    (highest). Lower row: partition, the selected quadrant bright and cut in four. Images smaller
    than 160 pixels are enlarged. A model without quad blocks gives the images alone.
    """
    views, base = block_views(model, images), photo(images)
    if not views:
        return base.cpu()
    upper = [base] + [_score_panel(base, view.score) for view in views]
    lower = [base] + [_partition_panel(base, view) for view in views]
    return torch.cat([side_by_side(upper), side_by_side(lower)], 2).cpu()


def photo(images: Tensor, least: int = _MIN_SIDE) -> Tensor:
    """Normalised images (b, 3, H, W) in [0, 1], enlarged by a whole factor to `least` pixels."""
    mean, std = (
        torch.tensor(v, device=images.device).view(3, 1, 1)
        for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    base = (images.float() * std + mean).clamp(0, 1)
    factor = -(-least // min(base.shape[2:]))
    return repeat(base, "b c h w -> b c (h i) (w j)", i=factor, j=factor)


def side_by_side(panels: Sequence[Tensor]) -> Tensor:
    """Panels (b, 3, H, W) in a row, each in a black frame of GAP pixels."""
    return torch.cat([F.pad(panel, [GAP] * 4) for panel in panels], 3)


def heat(level: Tensor) -> Tensor:
    """Colours (b, 3, h, w) of levels (b, h, w) from 0 (dark) to 1 (light)."""
    level = level * (len(_HEAT) - 1)
    colours = torch.tensor(_HEAT, device=level.device)
    step = level.long().clamp(max=len(_HEAT) - 2)
    part = (level - step).float()[..., None]
    colour = colours[step] * (1 - part) + colours[step + 1] * part
    return rearrange(colour, "b h w c -> b c h w")


def _score_panel(base: Tensor, score: Tensor | None) -> Tensor:
    """Scores (b, h, w) as colours over the grey image (b, 3, H, W); grey where there are none."""
    if score is None:
        return base.mean(1, keepdim=True).expand_as(base)
    low, high = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
    colour = heat(((score - low) / (high - low)).nan_to_num(0))
    return 0.35 * base.mean(1, keepdim=True) + 0.65 * F.interpolate(colour, base.shape[2:])


def _partition_panel(base: Tensor, view: BlockView) -> Tensor:
    """Windows outlined on the image (b, 3, H, W), those outside the selected quadrant dimmed."""
    window, selected = (
        F.interpolate(labels[:, None].to(base.dtype), base.shape[2:])
        for labels in (view.window, view.selected)
    )  # (b, 1, H, W)
    panel = torch.where(selected > 0, base, _DIM * base)
    outside = torch.where(selected > 0, -1, window)  # the selected quadrant as a whole
    for labels, colour in ((window, _FINE_LINE), (outside, _COARSE_LINE)):
        line = torch.tensor(colour, device=base.device, dtype=base.dtype).view(3, 1, 1)
        panel = torch.where(_borders(labels), line, panel)
    return panel


def _borders(labels: Tensor) -> Tensor:
    """Pixels (b, 1, H, W) within a line's width of another label."""
    width = 2 * (min(labels.shape[2:]) // 320) + 1
    highest = F.max_pool2d(labels, 3, 1, 1)
    lowest = -F.max_pool2d(-labels, 3, 1, 1)
    return F.max_pool2d((highest != lowest).to(labels.dtype), width, 1, width // 2) > 0
