"""Official checkpoints: from their tensor names and shapes to a `QuadMamba`, and back.

The official QuadMamba and the classification models of VMamba share their names:

| official, of block i.j | here | shape |
|---|---|---|
| layers.i.blocks.j.norm, norm2, mlp.fc1, mlp.fc2 | stages.i.j, the same | |
| op.in_proj, op.conv2d, op.out_norm, op.out_proj | op.in_proj, op.conv, the same | |
| op.x_proj_weight | op.ssm.x_proj_weight | (k, r + 2n, d), rows dt, B, C |
| op.dt_projs_weight, op.dt_projs_bias | op.ssm.dt_weight, dt_bias | (k, d, r), (k, d) |
| op.A_logs | op.ssm.A_log | (k·d, n), here (k, d, n) |
| op.Ds | op.ssm.D | (k·d), here (k, d) |
| op.score_predictor.in_conv.{0,1} | op.predictor.embed.{0,1} | |
| op.score_predictor.out_conv.{0,2,4} | op.predictor.score.{0,2,4} | |
| patch_embed.{0,2,5,7} | stem.{0,1,3,4} | |
| layers.i.downsample.{1,3} | downsamples.i.{0,1} | |
| classifier.{norm,head} | head.{norm,fc} | |

Older VMamba files write layers.i.blocks.j.ln_1 for norm and self_attention for op, and norm and
head for the classifier. Routes: the sequence forwards and backwards in quad blocks; rows, columns
and both backwards in the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from quadmamba.models.orders import SHIFT_SIGNS, RasterOrder, ReleaseOrder
from quadmamba.models.quadmamba import QuadMamba
from quadmamba.models.ss2d import SS2D, QuadSS2D

# Older spellings and what they became
_OLD = (
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^(norm|head)\."), r"classifier.\1."),
)
# Official and own prefix; {0} and {1} are the numbers of a stage and a block
_NAMES = (
    ("patch_embed.0", "stem.0"),
    ("patch_embed.2", "stem.1"),
    ("patch_embed.5", "stem.3"),
    ("patch_embed.7", "stem.4"),
    ("layers.{0}.downsample.1", "downsamples.{0}.0"),
    ("layers.{0}.downsample.3", "downsamples.{0}.1"),
    ("layers.{0}.blocks.{1}.op.conv2d", "stages.{0}.{1}.op.conv"),
    ("layers.{0}.blocks.{1}.op.x_proj_weight", "stages.{0}.{1}.op.ssm.x_proj_weight"),
    ("layers.{0}.blocks.{1}.op.dt_projs_weight", "stages.{0}.{1}.op.ssm.dt_weight"),
    ("layers.{0}.blocks.{1}.op.dt_projs_bias", "stages.{0}.{1}.op.ssm.dt_bias"),
    ("layers.{0}.blocks.{1}.op.A_logs", "stages.{0}.{1}.op.ssm.A_log"),
    ("layers.{0}.blocks.{1}.op.Ds", "stages.{0}.{1}.op.ssm.D"),
    ("layers.{0}.blocks.{1}.op.score_predictor.in_conv", "stages.{0}.{1}.op.predictor.embed"),
    ("layers.{0}.blocks.{1}.op.score_predictor.out_conv", "stages.{0}.{1}.op.predictor.score"),
    ("layers.{0}.blocks.{1}", "stages.{0}.{1}"),
    ("classifier.norm", "head.norm"),
    ("classifier.head", "head.fc"),
)
# First words of official names: of the backbone, and of the classifier, today's and older
BODY, CLASSIFIER = ("patch_embed", "layers"), ("classifier", "norm", "head")
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.")
_STAGES = 4


class ReleaseError(ValueError):
    """Tensors that are no official checkpoint of this architecture; the message lists them."""


def from_release(state_dict: Mapping[str, Tensor]) -> QuadMamba:
    """The model of an official state dict, in the dtype of its tensors and in training mode.

    Dims, depths, ratios, classes and orders follow from names and shapes: stages whose blocks have
    a score predictor take the `release` order, the others `raster`. In eval mode the quadrant is
    the one with the highest score; the official code adds noise there too.
    Raises ReleaseError, with a list, where a tensor is missing, unexpected or of another shape.
    """
    state = _modern(state_dict)
    model = QuadMamba(**read_architecture(state)).to(_dtype(state))
    own = model.state_dict()
    names = {official_name(name): name for name in own}
    wrong = {
        "missing": [name for name in names if name not in state],
        "unexpected": [name for name in state if name not in names],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(_official(own[key], name).shape)}"
            for name, key in names.items()
            if name in state and state[name].shape != _official(own[key], name).shape
        ],
    }
    if any(wrong.values()):
        lines = [f"expected the {len(names)} tensors of an official checkpoint, got {len(state)}:"]
        lines += [f"  {len(v)} {kind}: {', '.join(v)}" for kind, v in wrong.items() if v]
        raise ReleaseError("\n".join(lines))
    model.load_state_dict({key: state[name].view_as(own[key]) for name, key in names.items()})
    return model


def to_release(model: QuadMamba) -> dict[str, Tensor]:
    """The state dict of `model` under the official names and shapes; tensors share its memory.

    Raises ReleaseError for a scan that the official code does not have.
    """
    index = 0
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage):
            sign = SHIFT_SIGNS[index // 2 % len(SHIFT_SIGNS)] if j % 2 else None
            _check_published(f"stages.{i}.{j}", block.op, sign)
            index += 1
    names = ((official_name(key), tensor) for key, tensor in model.state_dict().items())
    return {name: _official(tensor, name) for name, tensor in names}


def _check_published(name: str, op: SS2D, sign: tuple[int, int] | None) -> None:
    """Raise ReleaseError where the official code has no such mixer at this place."""
    if isinstance(op, QuadSS2D):
        fits = op.order == ReleaseOrder() and op.predictor is not None and op.sign == sign
    else:
        fits = isinstance(op.order, RasterOrder)
    if not fits:
        raise ReleaseError(
            f"{name}: expected a scan of the official code, raster or release, the latter with "
            f"partition (2, 4), a predictor and shift {sign}, got {op.extra_repr()}"
        )


def read_architecture(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The arguments of `QuadMamba` that the names and shapes of an official state dict imply.

    Raises ReleaseError where a tensor that tells one of them is missing.
    """
    blocks = {tuple(map(int, m.groups())) for m in map(_BLOCK.match, state) if m}
    depths = [sum(stage == i for stage, _ in blocks) for i in range(_STAGES)]
    if 0 in depths or blocks != {(i, j) for i in range(_STAGES) for j in range(depths[i])}:
        raise ReleaseError(
            f"expected layers.i.blocks.j with 4 stages i and blocks j = 0, 1, ..., got {depths} "
            f"blocks in stages 0 to 3, and keys such as {', '.join(list(state)[:4])}"
        )
    first = [f"layers.{i}.blocks.0" for i in range(_STAGES)]
    dims, inner, hidden = (
        [_size(state, f"{block}.{name}.weight", 0) for block in first]
        for name in ("norm", "op.conv2d", "mlp.fc1")
    )
    quad = [any(key.startswith(f"{block}.op.score_predictor.") for key in state) for block in first]
    return {
        "dims": dims,
        "depths": depths,
        "orders": ["release" if has else "raster" for has in quad],
        "num_classes": _size(state, "classifier.head.weight", 0),
        "in_chans": _size(state, "patch_embed.0.weight", 1),
        "ssm_ratio": _ratio("inner channels", inner, dims),
        "d_state": _size(state, f"{first[0]}.op.A_logs", 1),
        "mlp_ratio": _ratio("hidden channels", hidden, dims),
    }


def official_name(name: str) -> str:
    """The official name of one of our parameters."""
    for official, own in _NAMES:
        pattern = re.escape(own).replace(r"\{0\}", r"(\d+)").replace(r"\{1\}", r"(\d+)")
        if found := re.match(rf"{pattern}(?=\.|$)", name):
            return official.format(*found.groups()) + name[found.end() :]
    raise AssertionError(f"a parameter without an official name: {name}")


def _official(tensor: Tensor, name: str) -> Tensor:
    """`tensor` in its official shape: that of one route after the other for A and D."""
    return (
        rearrange(tensor, "k d ... -> (k d) ...") if name.endswith((".A_logs", ".Ds")) else tensor
    )


def _modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with today's names, and 1x1 filters (o, i, 1, 1) as matrices (o, i)."""
    modern = {}
    for name, tensor in state.items():
        for pattern, replacement in _OLD:
            name = pattern.sub(replacement, name)
        if name in modern:
            raise ReleaseError(f"expected each tensor once, got {name} under two spellings")
        is_filter = tensor.shape[2:] == (1, 1)
        modern[name] = rearrange(tensor, "o i 1 1 -> o i") if is_filter else tensor
    return modern


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ReleaseError(f"expected tensors of one floating type, got {sorted(map(str, dtypes))}")
    return dtypes.pop()


def _size(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    if name not in state or state[name].dim() <= axis:
        found = tuple(state[name].shape) if name in state else "none"
        raise ReleaseError(f"expected a tensor {name}, which tells the architecture, got {found}")
    return state[name].shape[axis]


def _ratio(what: str, wide: Sequence[int], dims: Sequence[int]) -> float:
    """The r for which int(dim · r) is the width of each stage."""
    for ratio in _candidates(wide, dims):
        if [int(dim * ratio) for dim in dims] == list(wide):
            return ratio
    raise ReleaseError(f"expected one ratio of {what} in all stages, got {wide} for dims {dims}")


def _candidates(wide: Sequence[int], dims: Sequence[int]) -> Iterator[float]:
    for a, b in zip(wide, dims):
        yield a / b
        yield math.nextafter(a / b, math.inf)  # where dim · (a / b) comes out just below a
