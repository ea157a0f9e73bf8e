"""Which device a process gets, and what its place among the others tells."""

import pytest
import torch

from quadmamba.utils.distributed import World, choose_device
from quadmamba.utils.launch import DeviceError, Place


@pytest.fixture
def gpus(monkeypatch):
    """Lets this host have so many GPUs."""

    def have(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return have


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_a_rank_gets_the_gpu_of_its_number_on_the_node(kind, gpus):
    gpus(4)
    place = Place(rank=6, local_rank=2, local_size=4, size=8, launched=True)
    assert choose_device(kind, place) == torch.device("cuda", 2)
    assert choose_device(kind, Place()) == torch.device("cuda", 0)
    assert choose_device("cpu", place) == torch.device("cpu")


def test_processes_of_the_node_are_compared_with_its_gpus(gpus):
    gpus(2)
    many = Place(rank=5, local_rank=1, local_size=2, size=8, launched=True)
    assert choose_device("cuda", many) == torch.device("cuda", 1), "8 on four nodes"
    with pytest.raises(DeviceError, match="expected at most 2 processes on this node.* got 3"):
        choose_device("auto", Place(rank=0, local_rank=0, local_size=3, size=3, launched=True))
    assert choose_device("cpu", Place(local_size=3, size=3)) == torch.device("cpu")


def test_without_a_gpu(gpus):
    gpus(0)
    assert choose_device("auto", Place(1, 1, 2, 2)) == torch.device("cpu")
    with pytest.raises(DeviceError, match="DEVICE cuda: expected a GPU, found none"):
        choose_device("cuda", Place())


def test_the_main_rank_is_the_first_of_all():
    assert Place().is_main
    assert World(rank=0, local_rank=0, size=2).is_main
    assert not World(rank=2, local_rank=0, size=4).is_main


def test_a_world_of_one_sums_and_gathers_itself():
    values = torch.tensor([1.0, 2.0])
    assert World().sum(values) is values
    assert World().gather("x") == ["x"]
