"""`python -m selective_scan.doctor`: one screen on what is installed, what runs, what to do."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import library
from .ops import selective_scan
from .reference import selective_scan_ref

BUILD = library.BUILD_COMMAND
OPS = ("selective_scan_fwd", "selective_scan_bwd", "route_scan_fwd", "route_scan_bwd")


def build_info() -> dict[str, str]:
    """What the library says of its own build: compiler, nvcc, arches. Empty where there is none."""
    if library.LOAD_ERROR is not None:
        return {}
    describe = ctypes.CDLL(str(library.PATH)).selective_scan_build
    describe.restype = ctypes.c_char_p
    pairs = (item.split("=", 1) for item in describe().decode().split(";"))
    return {key: value.replace(",", " ") for key, value in pairs}


def find_nvcc() -> str | None:
    """The nvcc that a build would take: CUDA_HOME, PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def tool_version(tool: str | None) -> str:
    """Path and version line of a compiler, or "not found"."""
    if tool is None:
        return "not found"
    lines = subprocess.run(
        [tool, "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    wanted = [line for line in lines if "release" in line] or lines[:1] or ["unknown version"]
    return f"{tool} ({wanted[0].strip()})"


def has_code_for(capability: tuple[int, int], arches: str) -> bool:
    """Whether a library built for `arches` ("8.0 9.0+PTX") runs on a GPU of this capability.

    Machine code serves later minor versions of its major version, PTX every later version.
    """
    for arch in arches.split():
        number = arch.removesuffix("+PTX").rstrip("af")
        major, minor = (int(part) for part in number.split("."))
        later = (major, minor) <= capability
        if later and (major == capability[0] or arch.endswith("+PTX")):
            return True
    return False


def self_test(device: str) -> str:
    """Error of a small scan on `device` against the float64 reference, as a line."""
    generator = torch.Generator().manual_seed(0)
    u, delta = (torch.rand(2, 8, 300, generator=generator) for _ in range(2))
    B, C = (torch.randn(2, 2, 2, 300, generator=generator) for _ in range(2))
    A = -torch.rand(8, 2, generator=generator)
    expected = selective_scan_ref(u.double(), delta.double(), A.double(), B.double(), C.double())
    got = selective_scan(u.to(device), delta.to(device), A.to(device), B.to(device), C.to(device))
    assert isinstance(expected, torch.Tensor)
    assert isinstance(got, torch.Tensor)
    error = ((got.cpu() - expected).norm() / expected.norm()).item()
    return f"{'ok' if error < 1e-5 else 'WRONG'}, relative error {error:.0e}"


def quadmamba_sources() -> Path | None:
    """The copy among the sources of the QuadMamba that Python finds, if there is one."""
    spec = importlib.util.find_spec("quadmamba")
    root = Path(spec.origin).resolve().parent if spec and spec.origin else Path()
    folder = root / "kernels" / "selective_scan" / "selective_scan"
    return folder if folder.is_dir() else None


def taken_copy(installed: Path | None, sources: Path) -> Path:
    """The copy that QuadMamba takes: the installed one if it is of its own sources' version."""
    same = installed and library.version_at(installed) == library.version_at(sources)
    return installed if installed and same else sources


def owners_of(folder: Path) -> list[str]:
    """Names of the distributions that installed the copy in `folder`."""
    names = {*importlib.metadata.packages_distributions().get("selective_scan", ())}
    files = {name: importlib.metadata.files(name) or [] for name in names}
    first = folder / "__init__.py"
    return sorted(n for n in names if any(Path(f.locate()).resolve() == first for f in files[n]))


def advice_on_copies(installed: Path | None, sources: Path | None) -> Iterator[str]:
    """What to do where more than one copy of this package is about."""
    if installed is None:
        return
    owners = " ".join(owners_of(installed)) or "it"
    if " " in owners:
        yield f"several own {installed}: pip uninstall {owners}, then {BUILD}"
    elif not sources or installed == sources:
        return
    elif taken_copy(installed, sources) == sources:
        version = library.version_at(installed)
        yield f"{installed} is {version}: pip uninstall {owners}, then {BUILD}"
    elif not all(same_text(path, installed / path.name) for path in sources.glob("*.py")):
        yield f"{installed} differs from {sources}: {BUILD}"


def same_text(a: Path, b: Path) -> bool:
    """Whether both files are there and hold the same."""
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def _facts() -> Iterator[tuple[str, str]]:
    info = build_info()
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda}), {torch.__file__}"
    yield "selective_scan", f"{library.version_at(library.HERE)}, {library.HERE}"
    if sources := quadmamba_sources():
        yield "quadmamba takes", str(taken_copy(library.installed(), sources))
    yield "library", library.LOAD_ERROR or str(library.PATH)
    if info:
        yield "built with", f"{info['cxx']}; {info['nvcc']}"
        yield "arch list", info["arches"] or "none: CPU kernels only"
    for op in OPS:
        yield op, " ".join(sorted(library.kernels_for(op))) or "no kernel: PyTorch reference"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
    yield "nvcc", tool_version(find_nvcc())
    yield "c++", tool_version(shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"))


def _tests() -> Iterator[tuple[str, str]]:
    kernels = library.kernels_for(OPS[0])
    if "cpu" in kernels:
        yield "test cpu", self_test("cpu")
    if "cuda" in kernels and torch.cuda.is_available():
        yield "test cuda", self_test("cuda")


def _advice() -> Iterator[str]:
    yield from advice_on_copies(library.installed(), quadmamba_sources())
    if library.LOAD_ERROR is not None:
        yield f"no compiled kernels; build them: {BUILD}"
        return
    arches = build_info()["arches"]
    if not arches and torch.cuda.is_available():
        yield f"built without CUDA: install nvcc, then {BUILD}"
    for index in range(torch.cuda.device_count() if arches else 0):
        capability = torch.cuda.get_device_capability(index)
        if not has_code_for(capability, arches):
            number = f"{capability[0]}.{capability[1]}"
            yield (
                f"no code for cuda:{index}: TORCH_CUDA_ARCH_LIST={number} {BUILD} --force-reinstall"
            )


def main(write: Callable[[str], object] = sys.stdout.write) -> int:
    """Write the report; 0 where there is nothing to do, 1 where there is."""
    for name, value in (*_facts(), *_tests()):
        write(f"{name:<20} {value}\n")
    todo = list(_advice())
    for line in todo:
        write(f"{'to do':<20} {line}\n")
    write(f"{'verdict':<20} {'see to do' if todo else 'nothing is missing'}\n")
    return int(bool(todo))


if __name__ == "__main__":
    raise SystemExit(main())
