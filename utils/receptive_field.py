"""Pictures of effective receptive fields: which pixels move the centre of each stage's map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from quadmamba.utils.views import receptive_fields
from quadmamba.utils.visualize import heat, photo, side_by_side

_DECADES = 3  # from light to dark; what is fainter than that is dark too


def field_image(model: nn.Module, images: Tensor) -> tuple[list[str], Tensor]:
    """Names of the columns, and one picture (1, 3, H', W') of normalised images (b, 3, H, W).

    Columns: the mean image, then each stage; logarithmic over three decades, light is strongest.
    """
    base = photo(images).mean(0, keepdim=True)
    panels = [base]
    for field in receptive_fields(model, images):
        level = 1 + (field / field.max()).clamp(min=1e-9).log10() / _DECADES
        panels.append(F.interpolate(heat(level.clamp(0, 1)[None]), base.shape[2:]))
    names = [f"stage {number}" for number in range(1, len(panels))]
    return ["mean image", *names], side_by_side(panels).cpu()
