"""Files damaged and built at random: what is bad is named, what is good is as Pillow reads it.

DAMAGED_FILES sets how many files are made (220), DAMAGED_SEED which (0).
"""

import hashlib
import json
import os
from collections import Counter

import numpy as np
import pytest
from damaged import FORMATS, write
from PIL import Image
from runs import finish, start

from quadmamba.configs import load_cfg
from quadmamba.tools.check_data import main as check_data

COUNT = int(os.environ.get("DAMAGED_FILES", 220))
SEED = int(os.environ.get("DAMAGED_SEED", 0))
LIMIT = load_cfg().DATA.MAX_PIXELS
MEMORY = 2e9

READ = """
import hashlib, json, resource, sys
from pathlib import Path
from quadmamba.data.datasets import FolderImages
from quadmamba.data.transforms import View

def digest(image):
    return View(hashlib.sha1(str(image.shape).encode() + image.numpy().tobytes()).hexdigest())

keys = dict(seed=0, on_error="raise", replace=False, max_pixels=int(sys.argv[2]))
data = FolderImages(Path(sys.argv[1]), digest, **keys)
read = {}
for index, (path, _) in enumerate(data.samples):
    sample = data[0, index]
    read[path] = sample.image or "error: " + sample.error
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"read": read, "peak": peak}))
"""


def by_pillow(path):
    """The digest of what Pillow makes of a file by the rules of docs/data.md, or why it is bad."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > LIMIT:
                return "error: too many pixels"
            image.load()
            deep = image.mode == "I;16" or (image.mode, image.format) == ("I", "PPM")
            if not deep and image.mode in ("I", "F"):
                return f"error: {image.mode}"
            if deep:
                grey = np.rint(np.asarray(image).astype(float) / 257).astype(np.uint8)
                pixels = np.repeat(grey[..., None], 3, 2)
            else:
                pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # noqa: BLE001 - Pillow may raise anything for a damaged file
        return f"error: {type(error).__name__}: {error}"
    shape = f"torch.Size({list(pixels.shape)})"
    return hashlib.sha1(shape.encode() + pixels.tobytes()).hexdigest()


def is_bad(result):
    return result.startswith("error: ")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.timeout(60 + COUNT)
def test_random_files_are_read_as_by_pillow_or_named(
    tmp_path, monkeypatch, capsys, record_property
):
    paths = write(tmp_path / "data", COUNT, SEED)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    expected = {str(path): by_pillow(path) for path in paths}
    code, out, err = finish(start(["-c", READ, tmp_path / "data", LIMIT]), timeout=60 + COUNT)
    assert code == 0, err
    assert "Traceback" not in err
    assert "Warning" not in err
    result = json.loads(out)
    read = result["read"]
    assert read.keys() == expected.keys()
    for path, got in read.items():
        if is_bad(got):
            assert is_bad(expected[path]), f"Pillow reads {path}; {got}"
            assert os.path.basename(path) in got
        else:
            assert got == expected[path], path
    assert result["peak"] < MEMORY
    assert check_data([str(tmp_path / "data"), "--json", "-", "--workers", "2"]) == 1
    found = json.loads(capsys.readouterr().out)
    listed = [
        name for kind in ("unreadable", "empty", "truncated", "too_large") for name in found[kind]
    ]
    bad = [path for path, got in read.items() if is_bad(got)]
    assert sorted(listed) == sorted(os.path.relpath(path, tmp_path / "data") for path in bad)
    assert all(found["reasons"].values())
    counts = Counter((os.path.basename(p).split("-")[1], is_bad(got)) for p, got in read.items())
    record_property("peak", result["peak"])
    for name in FORMATS:
        record_property(name, f"{counts[name, False]} good, {counts[name, True]} bad")
    assert all(counts[name, bad] for name in FORMATS for bad in (False, True))
