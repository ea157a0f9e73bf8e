"""Models: the QuadMamba backbone and its raster and window baselines."""

from __future__ import annotations

from typing import Any

from quadmamba.models.quadmamba import QuadMamba
from quadmamba.models.release import ReleaseError, from_release, to_release

__all__ = ["QuadMamba", "ReleaseError", "build_model", "from_release", "to_release"]


def build_model(cfg: Any, num_classes: int | None = None) -> QuadMamba:
    """The model of `cfg.MODEL`; `num_classes` goes before MODEL.NUM_CLASSES; 0 or None: 1000."""
    model = cfg.MODEL
    return QuadMamba(
        model.DIMS,
        depths=model.DEPTHS,
        orders=model.ORDERS,
        num_classes=num_classes or model.NUM_CLASSES or 1000,
        ssm_ratio=model.SSM_RATIO,
        d_state=model.D_STATE,
        mlp_ratio=model.MLP_RATIO,
        drop_path=model.DROP_PATH,
        window=model.WINDOW,
        partition=model.PARTITION,
        selection=model.SELECTION,
        shift=model.SHIFT,
        shift_directions=model.SHIFT_DIRECTIONS,
        tau=model.TAU,
        gumbel=model.GUMBEL,
        use_checkpoint=model.USE_CHECKPOINT,
    )
