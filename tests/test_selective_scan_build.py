"""Builds of the selective_scan distribution that need no GPU: Python alone, and what cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "selective_scan"

USE = """
import warnings
import torch, selective_scan
from selective_scan import library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.ones(1, 2, 8)
    for _ in range(2):
        y = selective_scan.selective_scan(x, x, -torch.ones(2, 1), x[:, None, :1], x[:, None, :1])
assert torch.isfinite(y).all()
devices = ",".join(sorted(library.kernels_for("selective_scan_fwd")))
ours = [w for w in caught if "selective_scan" in str(w.message)]
print(f"file={selective_scan.__file__} kernels={devices} warnings={len(ours)}")
"""


def copy_sources(target: Path, sources: str = "*") -> Path:
    """The distribution without anything built, with the named C++ sources alone."""
    kept = {path.name for path in (SOURCE / "csrc").glob(sources)}

    def ignore(folder, names):
        built = {name for name in names if name in ("build", "__pycache__", "_C.so")}
        if Path(folder).name == "csrc":
            built |= set(names) - kept
        return built

    return Path(shutil.copytree(SOURCE, target / "source", ignore=ignore))


def python(*arguments, cwd: Path, timeout: int = 240, **environment) -> str:
    """What a Python process says on both streams; fails with it where the process fails."""
    clean = {"PYTHONPATH": "", "MAX_JOBS": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **clean, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_skip_build_installs_the_reference_alone(tmp_path):
    source, target = copy_sources(tmp_path), tmp_path / "site"
    arguments = ("install", "--no-deps", "--no-build-isolation", "--no-index", "--target")
    said = python(
        *("-m", "pip", *arguments, str(target), "-v", "."),
        cwd=source,
        SELECTIVE_SCAN_SKIP_BUILD="1",
        PATH="/nonexistent",
    )
    assert "SELECTIVE_SCAN_SKIP_BUILD=1: installing the PyTorch reference alone" in said
    assert not list(target.rglob("*.so"))
    assert "Tag: py3-none-any\n" in next(target.glob("*.dist-info/WHEEL")).read_text()
    used = python("-c", USE, cwd=tmp_path, PYTHONPATH=str(target))
    assert f"file={target}" in used
    assert "kernels= warnings=1" in used


def program(folder: Path, name: str, text: str) -> Path:
    """A program of a shell script."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


TORCH = "class version:\n    cuda = '13.0'\n__version__ = '2.11.0+cu130'"
# Sources, text of a torch to import, of an nvcc, environment, what the message holds
FAILURES = {
    "no sources": ("none", TORCH, None, {}, ["csrc/*.cpp, got none", "take a whole checkout"]),
    "headers alone": ("*.h", TORCH, None, {}, ["csrc/*.cpp, got none"]),
    "no CUDA sources": ("*.cpp", TORCH, "echo compute_90", {}, ["csrc/*.cu, got none"]),
    "no torch": ("*", "raise ImportError('no torch')", None, {}, ["got none", "--no-build-iso"]),
    "old torch": ("*", "__version__ = '2.9.1'", None, {}, ["PyTorch 2.10 or later", "got 2.9.1"]),
    "no compiler": ("*", TORCH, None, {"CXX": ""}, ["SELECTIVE_SCAN_SKIP_BUILD=1 to install"]),
    "wrong CXX": ("*", TORCH, None, {"CXX": "absent"}, ["no program absent"]),
    "broken nvcc": ("*", TORCH, "echo no driver >&2; exit 3", {}, ["got no driver", "CUDA_HOME"]),
    "old nvcc": ("*", TORCH, "echo compute_70 V10", {}, ["8.0, 8.6", "got compute_70 V10"]),
    "bad jobs": ("*", TORCH, None, {"MAX_JOBS": "many"}, ["MAX_JOBS to match", "got 'many'"]),
    "bad skip": ("*", TORCH, None, {"SELECTIVE_SCAN_SKIP_BUILD": "yes"}, ["SKIP_BUILD to match"]),
    "word as arch": ("*", TORCH, "", {"TORCH_CUDA_ARCH_LIST": "banana"}, ["such as 9.0, got"]),
    "bad arch": ("*", TORCH, "", {"TORCH_CUDA_ARCH_LIST": "9.0;x"}, ["such as 9.0, got"]),
}


@pytest.mark.parametrize("case", FAILURES)
def test_C2_a_build_that_cannot_be_ends_with_one_message(case, tmp_path):
    sources, torch, nvcc, environment, parts = FAILURES[case]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(torch)
    program(tmp_path, "c++", "echo 12")
    if nvcc is not None:
        program(tmp_path, "nvcc", nvcc)
    bare = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    bare["TORCH_CUDA_ARCH_LIST"] = ""  # of a make around the tests
    if case == "no compiler":
        bare["PATH"] = "/nonexistent"
    with pytest.raises(AssertionError) as failed:
        python(
            *("setup.py", "-q", "build_ext", "--inplace"),
            cwd=copy_sources(tmp_path, sources),
            **{**bare, **environment},
        )
    said = str(failed.value)
    assert all(part in said for part in parts), said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_C2_a_library_without_its_ops_is_an_error(tmp_path):
    source = copy_sources(tmp_path, "none")
    (source / "csrc").mkdir(exist_ok=True)
    (source / "csrc" / "empty.cpp").touch()
    with pytest.raises(AssertionError, match="expected a CPU kernel of selective_scan_fwd, got no"):
        python("setup.py", "-q", "build_ext", "--inplace", cwd=source, CUDA_HOME=str(tmp_path))
