"""Builds `selective_scan/_C.so`: a plain shared library on PyTorch's stable ABI, for any Python 3.

Environment: SELECTIVE_SCAN_SKIP_BUILD=1 installs the Python reference only; CUDA_HOME says which
nvcc to take (a folder without one means none); TORCH_CUDA_ARCH_LIST as for PyTorch; CXX the C++
compiler; MAX_JOBS the number of compilers that run at once. No GPU is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1 leaves the command to wheel
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent
ARCHES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
STABLE_ABI = "0x020a000000000000"  # PyTorch 2.10
HOST_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
SIMD_FLAGS = ["-fopenmp-simd", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def say(line: str) -> None:
    """Print one line where pip -v and a plain build show it."""
    sys.stderr.write(f"selective_scan: {line}\n")


def find_nvcc() -> str | None:
    """Path of nvcc: below CUDA_HOME where that is set, else on PATH, else /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def arch_list(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or the default list as far as nvcc knows it."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = subprocess.run(
            [nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True
        ).stdout.split()
        listed = [arch for arch in ARCHES if f"compute_{arch.replace('.', '')}" in known]
        listed[-1] += "+PTX"
    return listed


def arch_flags(arches: list[str]) -> list[str]:
    """-gencode flags for arches such as 9.0 or 12.0+PTX."""
    flags = []
    for arch in arches:
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0, got {arch!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def run(command: list[str]) -> None:
    """Run a compiler; on failure show what it said and stop."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout or done.stderr:
        sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"selective_scan: failed ({done.returncode}): {' '.join(command)}")


class Build:
    """Compiles csrc/*.cpp, and csrc/*.cu where there is an nvcc, and links them."""

    def __init__(self, folder: Path) -> None:
        import torch

        root = Path(torch.__file__).parent
        self.folder = folder
        self.lib = root / "lib"
        self.include = [f"-I{HERE / 'csrc'}", "-isystem", str(root / "include")]
        self.include += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        self.cxx = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        self.nvcc = find_nvcc()
        if self.cxx is None:
            raise SystemExit(
                "selective_scan: expected a C++17 compiler (CXX, c++ or g++), found none; install "
                "one, or set SELECTIVE_SCAN_SKIP_BUILD=1 to install the PyTorch reference alone"
            )
        if self.nvcc is None or torch.version.cuda is None:
            why = "no nvcc found" if self.nvcc is None else "this PyTorch has no CUDA"
            say(f"{why}: building the CPU kernels only")
            self.nvcc = None
        self.arches = [] if self.nvcc is None else arch_list(self.nvcc)
        self.describe = [f'-DSCAN_BUILD="{self.description()}"']

    def description(self) -> str:
        """What `selective_scan.doctor` reads back from the library."""
        cxx = subprocess.run([self.cxx, "-dumpfullversion"], capture_output=True, text=True)
        nvcc = "no nvcc"
        if self.nvcc is not None:
            said = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True)
            nvcc = f"nvcc {said.stdout.rsplit(' V', 1)[-1].split()[0]}"
        name = Path(self.cxx).name
        return f"cxx={name} {cxx.stdout.strip()};nvcc={nvcc};arches={','.join(self.arches)}"

    def command(self, source: Path, output: Path) -> list[str]:
        """The compiler call for one source."""
        ends = [*self.include, "-c", str(source), "-o", str(output)]
        if source.suffix == ".cpp":
            return [self.cxx, *HOST_FLAGS, *SIMD_FLAGS, *self.describe, *ends]
        flags = ["-O3", "-std=c++17"]
        flags += ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        return [self.nvcc, "-ccbin", self.cxx, *flags, *arch_flags(self.arches), *ends]

    def compile(self, source: Path) -> Path:
        """The object of one source, compiled unless newer than all it may depend on."""
        output = self.folder / f"{source.name}.o"
        stamp = output.with_suffix(".cmd")
        command = self.command(source, output)
        headers = [*(HERE / "csrc").glob("*.h"), *(HERE / "csrc").glob("*.cuh")]
        newest = max(path.stat().st_mtime for path in [source, *headers])
        text = "\n".join(command)
        fresh = output.exists() and output.stat().st_mtime > newest
        if not (fresh and stamp.exists() and stamp.read_text() == text):
            run(command)
            stamp.write_text(text)
        return output

    def link(self, objects: list[Path], output: Path) -> None:
        """One shared library; symbols of libtorch_cuda are looked up at the first CUDA call."""
        ends = [*map(str, objects), "-o", str(output), f"-L{self.lib}"]
        loose = ["--no-as-needed", "-ltorch", "-ltorch_cpu", "-z", "lazy"]
        if self.nvcc is None:
            wl = [f"-Wl,{','.join(['--no-as-needed', '-z', 'lazy'])}", "-ltorch", "-ltorch_cpu"]
            run([self.cxx, "-shared", *ends, *wl])
        else:
            wl = [f"-Xlinker={flag}" for flag in loose]
            run([self.nvcc, "-ccbin", self.cxx, "-shared", "-cudart=static", *ends, *wl])

    def __call__(self, output: Path) -> None:
        """Build the library at `output`."""
        sources = sorted((HERE / "csrc").glob("*.cpp"))
        if self.nvcc is not None:
            sources = sorted((HERE / "csrc").glob("*.cu")) + sources
        self.folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(self.compile, sources))
        self.link(objects, output)


class BuildKernels(build_ext):
    """`build_ext` that hands the whole work to `Build`."""

    def get_ext_filename(self, fullname: str) -> str:
        """A name without a Python tag."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build where setuptools wants the file."""
        Build(Path(self.build_temp).resolve())(Path(self.get_ext_fullpath(ext.name)).resolve())


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        platform = super().get_tag()[2]
        return "py3", "none", platform


def extensions() -> list[Extension]:
    """The library, unless SELECTIVE_SCAN_SKIP_BUILD asks for Python alone."""
    if os.environ.get("SELECTIVE_SCAN_SKIP_BUILD") == "1":
        say("SELECTIVE_SCAN_SKIP_BUILD=1: installing the PyTorch reference alone")
        return []
    return [Extension("selective_scan._C", sources=[])]


setup(
    packages=["selective_scan"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
