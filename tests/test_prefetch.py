"""The last steps of a batch: normalised, erased and handed from stream to stream."""

from contextlib import contextmanager

import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import functional as TF

from quadmamba.data import normalise
from quadmamba.data.datasets import Batch
from quadmamba.data.erasing import Hole, erase
from quadmamba.data.prefetch import Prefetcher

CPU = torch.device("cpu")


def batches(count, size=3, side=10):
    """Batches of random bytes with a hole in every second image."""
    rng = torch.Generator().manual_seed(0)
    for number in range(count):
        images = torch.randint(256, (size, side, side + 2, 3), generator=rng, dtype=torch.uint8)
        holes = [Hole(1, 2, 4, 5, 100 * number + i) if i % 2 else None for i in range(size)]
        yield Batch(images, torch.arange(size) + number, holes, [], "")


def test_bytes_become_normalised_floats():
    images = next(batches(1)).images
    got = normalise(images)
    floats = images.permute(0, 3, 1, 2) / 255
    expected = TF.normalize(floats, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_holes_are_filled_by_their_seed_alone(mode):
    plain = normalise(next(batches(1)).images)
    hole = Hole(1, 2, 4, 5, 7)

    def filled(number, seed=7):
        holes = [hole._replace(seed=seed) if i == number else None for i in range(3)]
        before = torch.get_rng_state()
        images = erase(plain.clone(), holes, mode)
        assert torch.equal(torch.get_rng_state(), before)
        changed = images != plain
        assert changed[number, :, 1:5, 2:7].all()
        assert changed.sum() == 3 * 4 * 5
        return images[number, :, 1:5, 2:7]

    assert torch.equal(filled(0), filled(2))
    assert torch.equal(filled(0), filled(0, seed=8)) == (mode == "const")


def test_a_cpu_gets_every_batch_in_order():
    results = list(Prefetcher(CPU, "pixel")(batches(3)))
    assert len(results) == 3
    for (images, targets), batch in zip(results, batches(3)):
        assert torch.equal(targets, batch.targets)
        assert torch.equal(images, erase(normalise(batch.images), batch.holes, "pixel"))


class FakeStream:
    """Writes down what is asked of a stream."""

    def __init__(self, name, notes):
        self.name, self.notes, self.events = name, notes, 0

    def record_event(self):
        self.events += 1
        self.notes.append(f"finished {self.events}")
        return self.events

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for {event}")


def test_a_gpu_batch_is_made_while_the_one_before_is_used(monkeypatch):
    notes = []
    main = FakeStream("main", notes)

    @contextmanager
    def entered(stream):
        notes.append(f"enter {stream.name}")
        yield
        notes.append("leave")

    def keep(tensor, stream):
        notes.append(f"kept for {stream.name} {tuple(tensor.shape)}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream("side", notes))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", keep)
    prefetcher = Prefetcher(torch.device("cuda"), "pixel")
    prefetcher.device = CPU  # where the copies go in this test
    for number, (images, targets) in enumerate(prefetcher(batches(3)), 1):
        notes.append(f"use {number}")
        assert torch.equal(targets, torch.arange(3) + number - 1)
        assert images.shape == (3, 3, 10, 12)
    made = [["enter side", f"finished {i}", "leave"] for i in (1, 2, 3)]
    kept = ["kept for main (3, 3, 10, 12)", "kept for main (3,)"]
    used = [[f"main waits for {i}", *kept, f"use {i}"] for i in (1, 2, 3)]
    assert notes == made[0] + made[1] + used[0] + made[2] + used[1] + used[2]
