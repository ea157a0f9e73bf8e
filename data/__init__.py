"""Data: images in class folders, the augmentation, and batches over all ranks."""

from quadmamba.data.datasets import FolderImages
from quadmamba.data.images import DataError, read_image
from quadmamba.data.loaders import ImageLoader, Loaders, build_loaders, skipped_images
from quadmamba.data.patience import LoaderError
from quadmamba.data.prefetch import Prefetcher, normalise
from quadmamba.data.seeds import seeded
from quadmamba.data.transforms import Transforms, build_transforms

__all__ = [
    "DataError",
    "FolderImages",
    "ImageLoader",
    "LoaderError",
    "Loaders",
    "Prefetcher",
    "Transforms",
    "build_loaders",
    "build_transforms",
    "normalise",
    "read_image",
    "seeded",
    "skipped_images",
]
