"""Builds `selective_scan/_C.so`: a plain shared library on PyTorch's stable ABI, for any Python 3.

Environment: SELECTIVE_SCAN_SKIP_BUILD=1 installs the Python reference only; CUDA_HOME says which
nvcc to take (a folder without one means none); TORCH_CUDA_ARCH_LIST as for PyTorch; CXX the C++
compiler; MAX_JOBS the number of compilers that run at once. No GPU is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NAME = "selective_scan"
OPS = ("selective_scan_fwd", "selective_scan_bwd", "route_scan_fwd", "route_scan_bwd")
SKIP = "set SELECTIVE_SCAN_SKIP_BUILD=1 to install the PyTorch reference alone"
NO_CUDA = "set CUDA_HOME to a folder without bin/nvcc to build the CPU kernels only"
INCOMPLETE = "this copy of the sources is not complete: take a whole checkout or sdist"
OLDEST_TORCH = (2, 10)
ARCHES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
STABLE_ABI = "0x020a000000000000"  # PyTorch 2.10
HOST_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
SIMD_FLAGS = ["-fopenmp-simd", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def say(line: str) -> None:
    """Print one line where pip -v and a plain build show it."""
    sys.stderr.write(f"selective_scan: {line}\n")


def fail(expected: str, got: str, todo: str) -> NoReturn:
    """End the build with one message."""
    raise SystemExit(f"selective_scan: expected {expected}, got {got}; {todo}")


def setting(name: str, default: str, choices: str) -> str:
    """An environment variable that is unset or matches the pattern `choices`."""
    value = os.environ.get(name) or default
    if not re.fullmatch(choices, value):
        fail(f"{name} to match {choices}", repr(value), f"unset it for {default}")
    return value


def import_torch() -> ModuleType:
    """PyTorch, whose headers and libraries the build takes: that of the Python that builds."""
    place = f"in {sys.prefix}, where the kernels are built"
    todo = "install it there; pip sees the installed one with --no-build-isolation"
    try:
        import torch
    except ImportError as error:
        fail(f"PyTorch 2.10 or later {place}", f"none ({error})", todo)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        fail(f"PyTorch 2.10 or later {place}", torch.__version__, todo)
    return torch


def find_cxx() -> str:
    """Path of the C++ compiler: CXX where that is set, else c++ or g++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        tried = " or ".join(names)
        fail("a C++17 compiler (CXX, c++ or g++)", f"no program {tried}", f"install one, or {SKIP}")
    return found


def find_nvcc(torch: ModuleType) -> str | None:
    """Path of nvcc: below CUDA_HOME where that is set, else on PATH, else /usr/local/cuda.

    None, said in one line, where there is none or PyTorch has no CUDA.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=str(Path(home) / "bin"))
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found and torch.version.cuda:
        return found
    where = f"in {Path(home) / 'bin'} (CUDA_HOME)" if home else "on PATH or in /usr/local/cuda/bin"
    why = f"no nvcc {where}" if not found else f"PyTorch {torch.__version__} has no CUDA"
    say(f"{why}: building the CPU kernels only")
    return None


def ask(*command: str) -> str:
    """What a compiler says of itself."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        fail(f"{' '.join(command)} to work", said, f"mend it, or {NO_CUDA}")


def arch_list(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or the default list as far as nvcc knows it."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = ask(nvcc, "--list-gpu-arch").split()
        listed = [arch for arch in ARCHES if f"compute_{arch.replace('.', '')}" in known]
        if not listed:
            fail(f"{nvcc} to know one of {', '.join(ARCHES)}", " ".join(known) or "none", NO_CUDA)
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
        failed = f"failed ({done.returncode}): {' '.join(command)}"
        raise SystemExit(f"selective_scan: {failed}\nTo do without it, {SKIP}")


class Build:
    """Compiles csrc/*.cpp, and csrc/*.cu where there is an nvcc, and links them."""

    def __init__(self, folder: Path) -> None:
        self.torch = import_torch()
        root = Path(self.torch.__file__).parent
        self.folder = folder
        self.lib = root / "lib"
        self.include = [f"-I{HERE / 'csrc'}", "-isystem", str(root / "include")]
        self.include += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        self.cxx = find_cxx()
        self.nvcc = find_nvcc(self.torch)
        self.jobs = int(setting("MAX_JOBS", str(os.cpu_count() or 1), "[1-9][0-9]*"))
        self.arches = [] if self.nvcc is None else arch_list(self.nvcc)
        self.describe = [f'-DSCAN_BUILD="{self.description()}"']

    def description(self) -> str:
        """What `selective_scan.doctor` reads back from the library."""
        cxx = subprocess.run([self.cxx, "-dumpfullversion"], capture_output=True, text=True)
        nvcc = "no nvcc"
        if self.nvcc is not None:
            version = re.search(r"V(\d[\d.]*)", ask(self.nvcc, "--version"))
            nvcc = f"nvcc {version[1] if version else 'of unknown version'}"
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

    def sources(self) -> list[Path]:
        """What is compiled: csrc/*.cu where there is an nvcc, and csrc/*.cpp."""
        kinds = ["*.cpp"] if self.nvcc is None else ["*.cu", "*.cpp"]
        found = {kind: sorted((HERE / "csrc").glob(kind)) for kind in kinds}
        for kind, paths in found.items():
            if not paths:
                fail(f"sources {HERE / 'csrc' / kind}", "none", INCOMPLETE)
        return [path for paths in found.values() for path in paths]

    def check(self, library: Path) -> None:
        """End the build where the library does not load or lacks a kernel: sources are missing."""
        try:
            self.torch.ops.load_library(str(library))
        except OSError as error:
            fail(f"{library} to load", str(error), INCOMPLETE)
        has = self.torch._C._dispatch_has_kernel_for_dispatch_key
        for key in ["CPU"] if self.nvcc is None else ["CPU", "CUDA"]:
            for op in OPS:
                if not hasattr(self.torch.ops.selective_scan, op) or not has(f"{NAME}::{op}", key):
                    fail(f"a {key} kernel of {op}", f"none in {HERE / 'csrc'}", INCOMPLETE)

    def __call__(self, output: Path) -> None:
        """Build the library at `output`."""
        sources = self.sources()
        self.folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            objects = list(pool.map(self.compile, sources))
        self.link(objects, output)
        self.check(output)


class BuildKernels(build_ext):
    """`build_ext` that hands the whole work to `Build`."""

    def get_ext_filename(self, fullname: str) -> str:
        """A name without a Python tag."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build where setuptools wants the file."""
        Build(Path(self.build_temp).resolve())(Path(self.get_ext_fullpath(ext.name)).resolve())


def wheel_command() -> dict[str, type[Command]]:
    """`bdist_wheel` for wheels of every Python 3; none where it is neither there nor needed."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # setuptools before 70.1 leaves the command to wheel
        try:
            from wheel.bdist_wheel import bdist_wheel
        except ImportError:
            if {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv):
                fail("setuptools 70.1 or later, or wheel", "neither", "pip install wheel")
            return {}

    class PlatformWheel(bdist_wheel):
        """A wheel for every Python 3."""

        def get_tag(self) -> tuple[str, str, str]:
            """py3-none-<platform>; any platform where no library is built."""
            built = self.distribution.ext_modules
            return "py3", "none", super().get_tag()[2] if built else "any"

    return {"bdist_wheel": PlatformWheel}


def extensions() -> list[Extension]:
    """The library, unless SELECTIVE_SCAN_SKIP_BUILD asks for Python alone."""
    if setting("SELECTIVE_SCAN_SKIP_BUILD", "0", "[01]") == "1":
        say("SELECTIVE_SCAN_SKIP_BUILD=1: installing the PyTorch reference alone")
        return []
    return [Extension(f"{NAME}._C", sources=[])]


setup(
    name="quadmamba-selective-scan",
    version=(HERE / NAME / "VERSION").read_text(encoding="utf-8").strip(),
    description="Selective scan for PyTorch: CUDA and CPU kernels on the stable ABI",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    install_requires=["torch>=2.10"],
    packages=[NAME],
    package_data={NAME: ["VERSION"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, **wheel_command()},
)
