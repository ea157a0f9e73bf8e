"""Pictures of scan paths: the tokens of an image joined in the order in which they are scanned."""

from __future__ import annotations

import torch
from PIL import ImageDraw
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from quadmamba.utils.views import scan_positions
from quadmamba.utils.visualize import photo, side_by_side

_TOKEN = 12  # pixels of a token at least
_START, _END, _JUMP = (60, 120, 255), (255, 220, 40), (150, 150, 150)


def path_images(model: nn.Module, images: Tensor) -> tuple[list[str], Tensor]:
    """Names of the columns, and a picture in [0, 1] of each normalised image (b, 3, H, W).

    Columns: the image, then the first route of each mixer, from blue (its start) to yellow (its
    end); steps to a token that is no neighbour are grey. Of neighbouring blocks that scan alike in
    all images only the first is shown.
    """
    shown: dict[str, Tensor] = {}
    for name, position in scan_positions(model, images).items():
        if not shown or not torch.equal(position, next(reversed(shown.values()))):
            shown[name] = position
    tokens = max(min(position.shape[1:]) for position in shown.values())
    base = photo(images, _TOKEN * tokens).cpu()
    panels = [
        torch.stack([_drawn(image, place) for image, place in zip(0.5 * base, position.cpu())])
        for position in shown.values()
    ]
    return ["image", *shown], side_by_side([base, *panels])


def _drawn(image: Tensor, position: Tensor) -> Tensor:
    """The image (3, H, W) with the path through its tokens (h, w) by their positions."""
    picture = to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    h, w = position.shape
    order = position.flatten().argsort(stable=True).tolist()
    points = [
        ((t % w + 0.5) * picture.width / w, (t // w + 0.5) * picture.height / h) for t in order
    ]
    steps = list(zip(order, order[1:], points, points[1:]))
    near = [abs(a // w - b // w) + abs(a % w - b % w) == 1 for a, b, *_ in steps]
    for (_, _, start, end), neighbour in zip(steps, near):
        if not neighbour:
            draw.line([start, end], _JUMP, 1)
    for number, (_, _, start, end) in enumerate(steps):
        if near[number]:
            part = number / len(steps)
            colour = tuple(round((1 - part) * a + part * b) for a, b in zip(_START, _END))
            draw.line([start, end], colour, 3)
    return pil_to_tensor(picture) / 255
