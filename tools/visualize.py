"""Draw the score map and the chosen partition of every quad block, one PNG an image.

    python tools/visualize.py dog.jpg cat.jpg --cfg configs/quadmamba_small.yaml \\
        --pretrained best.pth --output pictures

Columns: the image, then the blocks. Upper row: scores, dark (lowest) to light (highest). Lower row:
the partition; the selected quadrant is bright and cut in four. The head of the weights does not
matter. Wrong input ends with a message and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from quadmamba.configs import ConfigError, load_cfg
from quadmamba.data import DataError, build_transforms, normalise, read_image
from quadmamba.models import build_model
from quadmamba.utils.checkpoint import CheckpointError, load_pretrained
from quadmamba.utils.distributed import DeviceError, World, choose_device
from quadmamba.utils.visualize import partition_images, quad_blocks

_CAPTION = 16  # height of the line of captions, in pixels


def visualize(args: argparse.Namespace) -> list[Path]:
    """Write the pictures and return their paths. Raises the errors of wrong input."""
    cfg = load_cfg(args.cfg, opts=args.opts)
    device = choose_device(cfg.DEVICE, World())
    transform = build_transforms(cfg).val
    images = [transform(read_image(path)).image for path in args.images]
    model = build_model(cfg)
    names = ["image", *quad_blocks(model)]
    if len(names) == 1:
        raise ConfigError(f"{args.cfg}: expected a quadtree or release stage in MODEL.ORDERS")
    print(f"loaded {load_pretrained(model, args.pretrained, adapt_head=True)}")
    model.to(device)
    _make_folder(args.output)
    paths = []
    for number, (source, image) in enumerate(zip(args.images, images), 1):
        picture = partition_images(model, normalise(image[None].to(device)))[0]
        paths.append(args.output / f"{number:02d}_{source.stem}.png")
        caption(to_pil_image(picture), names).save(paths[-1])
    return paths


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


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--cfg", required=True, metavar="YAML", help="configuration of the model")
    parser.add_argument("--pretrained", required=True, metavar="CKPT", help="weights")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="any keys")
    try:
        for path in visualize(parser.parse_args(argv)):
            print(path)
    except (ConfigError, DataError, CheckpointError, DeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
