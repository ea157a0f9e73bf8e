"""Which implementation of the selective scan runs, and what is said where none is there."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from test_selective_scan import library, make_inputs, ops, scan, scan_ref


def test_float64_is_the_reference():
    inputs = make_inputs((1, 4, 20, 2, 2), torch.float64, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = scan(**inputs, delta_softplus=True)
    assert torch.equal(y, scan_ref(**inputs, delta_softplus=True, chunked=True))


def test_cpu_without_kernel_warns_once(monkeypatch):
    monkeypatch.setattr(ops, "KERNELS", frozenset())
    monkeypatch.setattr(library, "_warned", set())
    inputs = make_inputs((1, 4, 20, 2, 2), torch.float32, "cpu")
    with pytest.warns(RuntimeWarning, match="running the PyTorch reference"):
        y = scan(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(y, scan(**inputs))


def test_gpu_without_kernel_is_an_error():
    tensor = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="pip install --no-build-isolation"):
        library.use_kernel("selective_scan", tensor, frozenset({"cpu"}))
    assert library.use_kernel("selective_scan", tensor, frozenset({"cpu", "cuda"}))
