"""Builds of the selective_scan distribution that need no GPU: CPU kernels alone, Python alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "selective_scan"
has_compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")

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


def copy_sources(target: Path, sources: tuple[str, ...] = ("*",)) -> Path:
    """The distribution without anything built, with the named C++ sources alone."""
    kept = {path.name for pattern in sources for path in (SOURCE / "csrc").glob(pattern)}

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


@pytest.mark.skipif(has_compiler is None, reason="needs a C++ compiler")
def test_without_nvcc_the_cpu_kernels_are_built_and_one_line_says_so(tmp_path):
    source = copy_sources(tmp_path, ("*.h", "*.cuh", "*.cu", "selective_scan*"))
    said = python("setup.py", "build_ext", "--inplace", cwd=source, CUDA_HOME=str(tmp_path))
    lines = [line for line in said.splitlines() if line.startswith("selective_scan:")]
    assert lines == ["selective_scan: no nvcc found: building the CPU kernels only"]
    assert (source / "selective_scan" / "_C.so").exists()
    used = python("-c", USE, cwd=source)
    assert f"file={source}" in used
    assert "kernels=cpu warnings=0" in used
    report = subprocess.run(
        [sys.executable, "-m", "selective_scan.doctor"], cwd=source, capture_output=True, text=True
    ).stdout
    assert "none: CPU kernels only" in report
    assert "test cpu             ok" in report


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
    used = python("-c", USE, cwd=tmp_path, PYTHONPATH=str(target))
    assert f"file={target}" in used
    assert "kernels= warnings=1" in used


@pytest.mark.parametrize("arches", ["banana", "9.0;x"])
def test_bad_arch_list_says_what_was_expected(arches, tmp_path):
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho V13.0.1\n")
    tool.chmod(0o755)
    source = copy_sources(tmp_path)
    with pytest.raises(AssertionError, match="expected numbers such as 9.0, got"):
        python(
            *("setup.py", "build_ext", "--inplace"),
            cwd=source,
            CUDA_HOME=str(tmp_path),
            TORCH_CUDA_ARCH_LIST=arches,
        )


def test_no_compiler_says_how_to_go_on(tmp_path):
    source = copy_sources(tmp_path)
    with pytest.raises(AssertionError, match="SELECTIVE_SCAN_SKIP_BUILD=1 to install"):
        python("setup.py", "build_ext", "--inplace", cwd=source, CXX="absent", PATH="/nonexistent")
