"""Batches that come to a GPU over a side stream equal those of the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from quadmamba.configs import load_cfg
from quadmamba.data import build_loaders

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """48 training and 2 validation JPEGs in two classes."""
    path, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 48), ("val", 2)):
        for i in range(count):
            file = path / part / str(i % 2) / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (80, 90, 3), np.uint8)).save(file)
    return path


def loader(root, device, workers, mode):
    flags = {"DATA.PATH": str(root), "DATA.IMG_SIZE": 64, "DATA.BATCH_SIZE": 8}
    flags |= {"DATA.WORKERS": workers, "AUG.REPROB": 0.5, "AUG.REMODE": mode}
    return build_loaders(load_cfg(flags=flags), device=torch.device(device)).train


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_what_a_cpu_gets(root, workers):
    expected = list(loader(root, "cpu", 0, "const"))
    results = []
    for images, targets in loader(root, "cuda", workers, "const"):
        assert images.is_cuda
        assert targets.is_cuda
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):  # the consumer is late: its batch must not be overwritten meanwhile
            busy = busy @ busy * 1e-3
        results.append((images + 0 * busy[0, 0].nan_to_num(), targets + 0))
        del images, targets
    assert len(results) == 6
    for (images, targets), (right, classes) in zip(results, expected):
        assert torch.equal(targets.cpu(), classes)
        torch.testing.assert_close(images.cpu(), right, rtol=1e-5, atol=1e-5)


def test_noise_on_a_gpu_repeats(root):
    first, second = (
        torch.cat([images for images, _ in loader(root, "cuda", 0, "pixel")]) for _ in range(2)
    )
    assert torch.equal(first, second)
    plain = torch.cat([images for images, _ in loader(root, "cuda", 0, "const")])
    noise = first[first != plain]
    assert len(noise) > 1000
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
