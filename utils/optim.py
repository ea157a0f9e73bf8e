"""AdamW by parameter tags, and its cosine schedule per update."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from yacs.config import CfgNode

TAGS = ("decay", "no_decay", "ssm")
_WARMUP_SHARE = 20 / 300  # of the epochs, where TRAIN.WARMUP_EPOCHS would leave none of them


def lr_scale(cfg: CfgNode, world_size: int = 1) -> float:
    """Factor on the learning rates: images per update of all ranks / TRAIN.LR_BATCH (0: 1)."""
    batch = cfg.DATA.BATCH_SIZE * cfg.TRAIN.ACCUM_STEPS * world_size
    return batch / cfg.TRAIN.LR_BATCH if cfg.TRAIN.LR_BATCH else 1.0


def warmup_epochs(cfg: CfgNode) -> float:
    """Epochs of warm-up: TRAIN.WARMUP_EPOCHS, or of a shorter run a share as the recipe has it."""
    recipe = cfg.TRAIN
    fits = recipe.WARMUP_EPOCHS < recipe.EPOCHS
    return recipe.WARMUP_EPOCHS if fits else recipe.EPOCHS * _WARMUP_SHARE


def build_optimizer(cfg: CfgNode, model: nn.Module, *, world_size: int = 1) -> torch.optim.AdamW:
    """AdamW with two groups, decayed and not, by the tag `decay` that each parameter carries.

    "decay" is decayed, "no_decay" is not, "ssm" only with TRAIN.DECAY_SSM. Frozen parameters are
    left out. Fused: one kernel per step, and a step can be skipped on the device
    (`stepper.Stepper`).
    Raises ValueError for a parameter without a tag or with an unknown one.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, param in model.named_parameters():
        tag = getattr(param, "decay", None)
        if tag not in TAGS:
            raise ValueError(f"expected a tag decay in {TAGS} on parameter {name}, got {tag!r}")
        if param.requires_grad:
            groups[tag == "decay" or (tag == "ssm" and cfg.TRAIN.DECAY_SSM)].append(param)
    placed = [id(param) for params in groups.values() for param in params]
    wanted = {id(param) for param in model.parameters() if param.requires_grad}
    assert sorted(placed) == sorted(wanted), "a parameter in two groups or in none"
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": cfg.TRAIN.WEIGHT_DECAY},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=cfg.TRAIN.BASE_LR * lr_scale(cfg, world_size),
        betas=tuple(cfg.TRAIN.BETAS),
        eps=cfg.TRAIN.EPS,
        fused=True,
    )


def build_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, updates_per_epoch: int, *, world_size: int = 1
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to TRAIN.MIN_LR; `step_update(updates)` follows each update."""
    scale = lr_scale(cfg, world_size)
    warmup = round(warmup_epochs(cfg) * updates_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, cfg.TRAIN.EPOCHS * updates_per_epoch - warmup),
        lr_min=cfg.TRAIN.MIN_LR * scale,
        warmup_t=warmup,
        warmup_lr_init=cfg.TRAIN.WARMUP_LR * scale,
        warmup_prefix=True,
        t_in_epochs=False,
    )
