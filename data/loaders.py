"""Batches of images for training and validation, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from yacs.config import CfgNode

from quadmamba.data.datasets import Batch, FolderImages
from quadmamba.data.folders import differing_classes
from quadmamba.data.images import DataError
from quadmamba.data.patience import within
from quadmamba.data.prefetch import Prefetcher
from quadmamba.data.transforms import Transform, build_transforms
from quadmamba.data.workers import Draws, Workers

_CPU = torch.device("cpu")


class TrainSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs of one rank; `set_epoch` starts another order.

    The order depends on (seed, epoch) alone. Its images are dealt to the ranks one by one, so that
    k batches of all ranks are the same images for any number of ranks with the same total batch.
    What does not fill a share of every rank is left out. The epoch travels with the index, so that
    worker processes need no other word of it.
    """

    def __init__(self, images: int, *, rank: int, world_size: int, seed: int) -> None:
        self._images, self._rank, self._world_size = images, rank, world_size
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Go to an epoch, after the first `seen` images of its order."""
        self._epoch, self._seen = epoch, min(seen, self._images)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self._seed, self._epoch))
        order = rng.permutation(self._images)[self._seen :]
        share = order[self._rank :: self._world_size][: len(self)]
        return ((self._epoch, int(index)) for index in share)

    def __len__(self) -> int:
        return (self._images - self._seen) // self._world_size


class ImageLoader(DataLoader):
    """A DataLoader of normalised (images (b, 3, h, w), targets (b,)) on the device of `prefetcher`.

    The images are read by `Workers`, not by torch's, and are img_size squared. Workers wait for the
    next pass over the data; a pass that is left early ends them.
    Raises DataError, in the main process, for an unreadable image that may not be left out; those
    left out are added to `dataset.unreadable`. Raises LoaderError where a worker dies or stalls.
    """

    dataset: FolderImages

    def __init__(
        self, dataset: FolderImages, *, prefetcher: Prefetcher, img_size: int, **options: object
    ) -> None:
        super().__init__(dataset, **options)
        self.prefetcher = prefetcher
        self.img_size = img_size
        self._waiting: Workers | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        return self.prefetcher(self.fleeting_batches())

    def host_batches(self) -> Iterator[Batch]:
        """Batches of bytes in host memory, those without a readable image left out."""
        for batch in self.fleeting_batches():
            yield batch._replace(images=batch.images.clone())

    def read(self, draws: Draws) -> Batch:
        """The batch of some (epoch, index), in host memory, with the error of an unreadable one."""
        reader = self._start(workers=0, size=len(draws))
        try:
            batch = next(reader.batches([draws]))
            return batch._replace(images=None if batch.images is None else batch.images.clone())
        finally:
            reader.end()

    def fleeting_batches(self) -> Iterator[Batch]:
        """As host_batches, but the next one may overwrite the images."""
        workers, self._waiting = self._waiting, None
        workers = workers or self._start(self.num_workers, self.batch_size, lock=self.pin_memory)
        whole = False
        try:
            for batch in workers.batches(self.batch_sampler):
                if batch.error:
                    raise DataError(batch.error)
                self.dataset.unreadable.update(batch.unreadable)
                if batch.images is not None:
                    yield batch
                    self.prefetcher.wait()
            whole = True
        finally:
            if whole and self._waiting is None:
                self._waiting = workers
            else:
                workers.end()

    def _start(self, workers: int, size: int, *, lock: bool = False) -> Workers:
        return Workers(
            self.dataset, workers, size=size, side=self.img_size, timeout=self.timeout, lock=lock
        )


@dataclass(frozen=True)
class Loaders:
    """Batches of both parts of the data set.

    train: None where only validation was asked for. mixup: timm's Mixup, to be called on a
    training batch inside `seeded`; None where it is off. classes: the names of the folders.
    notes: what of the folders is left out, as lines to be said.
    """

    train: ImageLoader | None
    val: ImageLoader
    mixup: Mixup | None
    classes: list[str]
    notes: list[str]


def build_loaders(
    cfg: CfgNode,
    *,
    rank: int = 0,
    world_size: int = 1,
    with_train: bool = True,
    device: torch.device = _CPU,
) -> Loaders:
    """Loaders of this rank's share of cfg.DATA.PATH/train and cfg.DATA.PATH/val, on `device`.

    Training drops what does not fill a batch on every rank; validation covers each image exactly
    once over the ranks. Raises DataError for folders, classes or sizes that do not fit.
    """
    if not cfg.DATA.PATH:
        raise DataError("DATA.PATH (--data-path) is empty: give the folder of train/ and val/")
    try:
        transforms = build_transforms(cfg)
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"AUG.AUTO_AUGMENT: expected a policy that timm knows, such as rand-m9-mstd0.5-inc1, "
            f"got {cfg.AUG.AUTO_AUGMENT!r} ({error})"
        ) from error
    val_set = _build_dataset(cfg, "val", transforms.val)
    classes = val_set.classes
    _check_num_classes(cfg, classes)
    prefetcher = Prefetcher(device, cfg.AUG.REMODE)
    mine = [(0, i) for i in range(len(val_set))[rank::world_size]]
    val = _build_loader(cfg, val_set, mine, prefetcher)
    if not with_train:
        return Loaders(None, val, None, classes, val_set.notes)
    train_set = _build_dataset(cfg, "train", transforms.train)
    if message := differing_classes(cfg.DATA.PATH, train_set.classes, classes):
        raise DataError(message)
    _check_batch(cfg, len(train_set), world_size)
    sampler = TrainSampler(len(train_set), rank=rank, world_size=world_size, seed=cfg.TRAIN.SEED)
    train = _build_loader(cfg, train_set, sampler, prefetcher)
    notes = train_set.notes + val_set.notes
    return Loaders(train, val, _build_mixup(cfg, len(classes)), classes, notes)


def skipped_images(loader: ImageLoader) -> set[str]:
    """Unreadable files that this process left out so far."""
    return loader.dataset.unreadable


def _build_dataset(cfg: CfgNode, part: str, transform: Transform) -> FolderImages:
    root = Path(cfg.DATA.PATH) / part
    build = partial(
        FolderImages,
        root,
        transform,
        seed=cfg.TRAIN.SEED,
        on_error=cfg.DATA.ON_ERROR,
        replace=part == "train",
        max_pixels=cfg.DATA.MAX_PIXELS,
    )
    return within(cfg.DATA.TIMEOUT, str(root), lambda tell: build(tell=tell))


def _build_loader(
    cfg: CfgNode,
    dataset: FolderImages,
    sampler: TrainSampler | list[tuple[int, int]],
    prefetcher: Prefetcher,
) -> ImageLoader:
    return ImageLoader(
        dataset,
        prefetcher=prefetcher,
        img_size=cfg.DATA.IMG_SIZE,
        batch_size=cfg.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=cfg.DATA.WORKERS,
        pin_memory=cfg.DATA.PIN_MEMORY and prefetcher.device.type == "cuda",
        drop_last=isinstance(sampler, TrainSampler),
        timeout=cfg.DATA.TIMEOUT,
    )


def _build_mixup(cfg: CfgNode, num_classes: int) -> Mixup | None:
    aug = cfg.AUG
    if not aug.MIXUP and not aug.CUTMIX:
        return None
    if cfg.DATA.BATCH_SIZE % 2:
        raise DataError(
            f"DATA.BATCH_SIZE: expected an even number with Mixup or CutMix, "
            f"got {cfg.DATA.BATCH_SIZE} (AUG.MIXUP 0 AUG.CUTMIX 0 switch them off)"
        )
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        label_smoothing=cfg.TRAIN.LABEL_SMOOTHING,
        num_classes=num_classes,
    )


def _check_num_classes(cfg: CfgNode, classes: list[str]) -> None:
    if cfg.MODEL.NUM_CLASSES not in (0, len(classes)):
        raise DataError(
            f"MODEL.NUM_CLASSES: expected 0 or the {len(classes)} class folders of "
            f"{cfg.DATA.PATH}, got {cfg.MODEL.NUM_CLASSES}"
        )


def _check_batch(cfg: CfgNode, images: int, world_size: int) -> None:
    if images // world_size < cfg.DATA.BATCH_SIZE:
        raise DataError(
            f"DATA.BATCH_SIZE (--batch-size): expected at most {images // world_size}, as "
            f"{cfg.DATA.PATH}/train holds {images} images for {world_size} process(es), "
            f"got {cfg.DATA.BATCH_SIZE}"
        )
