"""What a model does with images: scores and partitions of quad blocks, scan paths, gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quadmamba.models.orders import window_index
from quadmamba.models.ss2d import SS2D, QuadSS2D


@dataclass(frozen=True)
class BlockView:
    """What one quad block does with a batch on its h x w grid.

    name: where the block is. score: (b, h, w), or None where no predictor selects. window: (b, h,
    w) the window in which each token is scanned, numbered first outside and then inside the
    selected quadrant. selected: (b, h, w) bool, the tokens of the selected quadrant.
    """

    name: str
    score: Tensor | None
    window: Tensor
    selected: Tensor


def mixers(model: nn.Module) -> dict[str, SS2D]:
    """The token mixers by name, in the order of the forward pass."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, SS2D):
            stage, block = (int(part) + 1 for part in path.split(".")[-3:-1])  # stages.0.1.op
            shifted = isinstance(module, QuadSS2D) and module.sign
            found[f"stage {stage} block {block}{', shifted' if shifted else ''}"] = module
    return found


def quad_blocks(model: nn.Module) -> dict[str, QuadSS2D]:
    """The token mixers that choose a partition, by name, in the order of the forward pass."""
    return {name: op for name, op in mixers(model).items() if isinstance(op, QuadSS2D)}


@torch.no_grad()
def block_views(model: nn.Module, images: Tensor) -> list[BlockView]:
    """What each quad block does with images (b, 3, H, W) in eval mode; the modes are restored."""
    blocks = quad_blocks(model)
    with eval_mode(model):
        tokens = _scanned(model, blocks, images)
        return [_view(name, op, tokens[name]) for name, op in blocks.items()]


@torch.no_grad()
def scan_positions(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Position (b, h, w) of each token in the first route of each mixer, in eval mode, by name.

    In the `release` order two tokens may share a position.
    """
    ops, positions = mixers(model), {}
    with eval_mode(model):
        for name, x in _scanned(model, ops, images).items():
            op, h, w = ops[name], int(x.shape[1]), int(x.shape[2])
            if isinstance(op, QuadSS2D):
                maps = op.order.maps(h, w, op.shift(h, w), x.device)
                _, selected = window_map(op, op.select(x), h, w)
                found = torch.where(selected.flatten(1), maps.fine, maps.coarse)  # (b, l)
            else:
                table = op.order.tables(h, w, x.device)[0].long()
                found = table.argsort().expand(len(x), -1)
            positions[name] = found.long().view(-1, h, w)
    return positions


def receptive_fields(model: nn.Module, images: Tensor) -> list[Tensor]:
    """How much each pixel moves the centre of each stage's map: (H, W), for the batch as a whole.

    The mean over images (b, 3, H, W) of the absolute gradient of the sum of the features at the
    centre, summed over colours (the effective receptive field of Luo et al., 2016), in eval mode.
    """
    images = images.detach().requires_grad_()
    fields = []
    with eval_mode(model), torch.enable_grad():
        for grid in model.forward_features(images):
            centre = grid[:, :, grid.shape[2] // 2, grid.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(centre, images, retain_graph=True)
            fields.append(gradient.abs().sum(1).mean(0))
    return fields


def _scanned(model: nn.Module, ops: Mapping[str, SS2D], images: Tensor) -> dict[str, Tensor]:
    """The tokens (b, h, w, d) that each of `ops` scans in a forward pass."""
    tokens: dict[str, Tensor] = {}
    hooks = [
        op.conv.register_forward_hook(lambda *call, name=name: tokens.update({name: call[2]}))
        for name, op in ops.items()
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return tokens


def _view(name: str, op: QuadSS2D, x: Tensor) -> BlockView:
    """What `op` does with the tokens x (b, h, w, d) that it scans."""
    score = op.predictor(x) if op.predictor is not None else None
    decision = op.select(x) if score is None else op.decide(score)
    return BlockView(name, score, *window_map(op, decision, int(x.shape[1]), int(x.shape[2])))


def window_map(op: QuadSS2D, decision: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Window of each token (b, h, w) of `op` under a decision (b, 4); whether it is selected.

    Windows outside the selected quadrant are numbered by rows of the whole grid, those inside from
    there on by rows of the quadrant.
    """
    device, shift = decision.device, op.shift(h, w)
    quadrant = op.order.maps(h, w, shift, device).quadrant.long().view(h, w)
    rows = (torch.arange(h, device=device) + shift[0]) % h
    columns = (torch.arange(w, device=device) + shift[1]) % w
    outside, inside = op.order.partition
    coarse = outside * window_index(rows, h, outside)[:, None] + window_index(columns, w, outside)
    side = max(inside // 2, 1)
    places = (window_index(i, n, inside) % side for i, n in ((rows, h), (columns, w)))
    fine = outside**2 + side * next(places)[:, None] + next(places)
    selected = quadrant == decision.argmax(-1)[:, None, None]  # (b, h, w)
    return torch.where(selected, fine, coarse), selected


def centre_rates(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, dict[str, float]]:
    """How often the selected quadrant of each block holds a point of the image, such as an object.

    batches: images (b, 3, H, W) and points (b, 2), row and column as fractions of the sides.
    By block: "rate", "constant" (that of the best quadrant if it were always selected) and
    "chance", 1/4.
    """
    hits: dict[str, Tensor] = {}
    count = 0
    for images, points in batches:
        count += len(images)
        for view in block_views(model, images):
            op = quad_blocks(model)[view.name]
            h, w = view.selected.shape[1:]
            y, x = (points * points.new_tensor([h, w])).long().unbind(1)
            quadrant = op.order.maps(h, w, op.shift(h, w), images.device).quadrant.view(h, w)
            chosen = view.selected[torch.arange(len(images), device=images.device), y, x]
            held = torch.bincount(quadrant[y, x], minlength=4)
            sums = torch.cat([chosen.sum()[None], held]).double().cpu()
            hits[view.name] = hits.get(view.name, 0) + sums
    return {
        name: {"rate": float(s[0] / count), "constant": float(s[1:].max() / count), "chance": 0.25}
        for name, s in hits.items()
    }


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, then each back in its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
