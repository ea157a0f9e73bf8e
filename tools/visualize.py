"""Draw what a model does with images.

    python tools/visualize.py dog.jpg cat.jpg --cfg configs/quadmamba_small.yaml \\
        --pretrained best.pth --output pictures --what partition

--what partition  scores (dark to light) and the chosen partition of each quad block; the selected
                  quadrant is bright and cut in smaller windows. One PNG an image.
--what path       the scan path of each kind of block over the image, from blue to yellow. One PNG
                  an image.
--what erf        the effective receptive field of each stage, over all images. One PNG.

Without --pretrained the weights are random. The head of the weights does not matter. Wrong input
ends with a message and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from quadmamba.configs import ConfigError, Parser, load_cfg, path_argument
from quadmamba.data import DataError, build_transforms, normalise, read_image
from quadmamba.models import build_model
from quadmamba.utils.checkpoint import load_pretrained
from quadmamba.utils.console import lasting_console
from quadmamba.utils.distributed import World, choose_device
from quadmamba.utils.formats import CheckpointError
from quadmamba.utils.launch import DeviceError
from quadmamba.utils.receptive_field import field_image
from quadmamba.utils.scan_path import path_images
from quadmamba.utils.views import quad_blocks
from quadmamba.utils.visualize import partition_images
from quadmamba.utils.writer import save_file

_CAPTION = 16  # height of the line of captions, in pixels
KINDS = ("partition", "path", "erf")


def visualize(args: argparse.Namespace) -> list[Path]:
    """Write the pictures and return their paths. Raises the errors of wrong input."""
    cfg = load_cfg(args.cfg, opts=args.opts)
    device = choose_device(cfg.DEVICE, World())
    transform = build_transforms(cfg).val
    read = [transform(read_image(path, cfg.DATA.MAX_PIXELS)).image for path in args.images]
    images = [normalise(image[None].to(device))[0] for image in read]
    torch.manual_seed(cfg.TRAIN.SEED)
    model = build_model(cfg)
    if args.what == "partition" and not quad_blocks(model):
        raise ConfigError(f"{args.cfg}: expected a quadtree or release stage in MODEL.ORDERS")
    if args.pretrained:
        print(f"loaded {load_pretrained(model, args.pretrained, adapt_head=True)}")
    else:
        print("random weights: give trained ones with --pretrained")
    model.to(device)
    _make_folder(args.output)
    names = [f"{number:02d}_{path.stem}" for number, path in enumerate(args.images, 1)]
    if args.what == "erf":
        names, images = ["erf"], [torch.stack(images)]
    paths = []
    for name, captions, picture in _pictures(args.what, model, names, images):
        paths.append(args.output / f"{name}.png")
        save_file(paths[-1], caption(to_pil_image(picture), captions).save)
    return paths


def _pictures(
    what: str, model: nn.Module, names: list[str], images: list[Tensor]
) -> Iterator[tuple[str, list[str], Tensor]]:
    """Name, captions of the columns and picture (3, H, W) of each image, or of the batch of erf."""
    for name, image in zip(names, images):
        if what == "erf":
            captions, pictures = field_image(model, image)
        elif what == "path":
            captions, pictures = path_images(model, image[None])
        else:
            captions = ["image", *quad_blocks(model)]
            pictures = partition_images(model, image[None])
        yield name, captions, pictures[0]


def caption(picture: Image.Image, names: list[str]) -> Image.Image:
    """The picture below a line with the names of its columns."""
    framed = Image.new("RGB", (picture.width, picture.height + _CAPTION))
    framed.paste(picture, (0, _CAPTION))
    draw = ImageDraw.Draw(framed)
    for column, name in enumerate(names):
        draw.text((column * picture.width // len(names) + 4, 3), name, fill="white")
    return framed


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output: cannot write to {folder}: {error}") from error


@lasting_console()
def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", type=path_argument, metavar="IMAGE")
    parser.add_argument("--what", choices=KINDS, default=KINDS[0], help="kind of picture")
    parser.add_argument("--cfg", required=True, metavar="YAML", help="configuration of the model")
    parser.add_argument("--pretrained", type=path_argument, metavar="CKPT", help="weights")
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="any keys"
    )
    try:
        for path in visualize(parser.parse_args(argv)):
            print(path)
    except (ConfigError, DataError, CheckpointError, DeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
