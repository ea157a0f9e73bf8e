"""Builds the CUDA sources of selective_scan for a CPU: python tests/emulate.py FOLDER

FOLDER then holds a package `selective_scan` whose CPU ops are the CUDA kernels: with it first on
PYTHONPATH, the tests of CPU tensors test these. What the kernels run on is in tests/emulator; the
sources are changed in a few words alone, those of `WORDS`. Needs a C++ compiler and Triton, which
brings the headers of CUDA.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels" / "selective_scan"
TORCH = Path(torch.__file__).parent
INCLUDE = (
    HERE / "emulator",
    Path(triton.__file__).parent / "backends" / "nvidia" / "include",
    TORCH / "include",
)
DEFINE = ("-DTORCH_TARGET_VERSION=0x020a000000000000", '-DSCAN_BUILD="emulated"')
FLAGS = (
    *("-O2", "-march=native", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w"),
    "-U_FORTIFY_SOURCE",  # it takes a jump to another fiber's stack for an error
)
WORDS = {
    r"(\w+(?:<\w+>)?)<<<(.*?)>>>\(": r"emulator::Launch(\2)(\1, ",
    r", \)": r")",
    r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];": (
        r"\1* \2 = reinterpret_cast<\1*>(emulator::shared());"
    ),
    r"STABLE_TORCH_LIBRARY_IMPL\(selective_scan, CUDA": (
        r"STABLE_TORCH_LIBRARY_IMPL(selective_scan, CPU"
    ),
    r"using DeviceGuard = [^;]*;": r"struct DeviceGuard { explicit DeviceGuard(int) {} };",
    r"#include <array>": '#include <array>\n#include "product.h"',
    r"torch_call_dispatcher\(\"aten::bmm\", \"dtype\", (.*?), TORCH_ABI_VERSION\)": (
        r"emulator::product(\1)"
    ),
}


def translate(folder: Path) -> None:
    """Write all sources to `folder` as C++ and nothing else; what stays the same is not touched."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*(KERNELS / "csrc").iterdir(), *(HERE / "emulator").glob("*.*")]
    texts = {path.name: path.read_text() for path in sources}  # ptx.cuh: the emulator's
    for name, text in texts.items():
        if name.endswith((".cu", ".cuh", ".cpp")):
            for pattern, replacement in WORDS.items():
                text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        target = folder / name
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    for path in folder.iterdir():
        if path.suffix not in (".o", ".cmd") and path.name not in texts:
            path.unlink()


def compile_source(source: Path) -> Path:
    """The object of one source, compiled unless it is newer than all that it may depend on."""
    output, stamp = source.with_suffix(".o"), source.with_suffix(".cmd")
    include = [word for folder in INCLUDE for word in ("-isystem", folder)]
    words = ["-x", "c++", "-include", source.parent / "emulator.h", "-c", source, "-o", output]
    command = [*map(str, ["c++", *FLAGS, *DEFINE, *include, *words])]
    text = "\n".join([torch.__version__, triton.__version__, *command])
    depends = [source, *source.parent.glob("*.h"), *source.parent.glob("*.cuh")]
    newest = max(path.stat().st_mtime for path in depends)
    fresh = output.exists() and output.stat().st_mtime > newest
    if not (fresh and stamp.exists() and stamp.read_text() == text):
        subprocess.run(command, check=True)
        stamp.write_text(text)
    return output


def link(folder: Path, names: Sequence[str], library: Path) -> Path:
    """Compile the sources of these names and the emulator, and link them to `library`."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, [folder / name for name in names]))
    ends = ["-Wl,-Bsymbolic,--no-as-needed", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]
    subprocess.run(["c++", "-shared", *objects, "-o", library, *ends], check=True)
    return library


def build(folder: Path) -> Path:
    """Build the package in `folder` and return its library."""
    translate(folder / "csrc")
    package = folder / "selective_scan"
    package.mkdir(exist_ok=True)
    sources = KERNELS / "selective_scan"
    for path in (*sources.glob("*.py"), sources / "VERSION"):
        shutil.copy(path, package)
    cuda = sorted(path.name for path in (KERNELS / "csrc").glob("*.cu"))
    schemas = ["route.cpp", "selective_scan.cpp"]
    return link(folder / "csrc", ["emulator.cpp", *schemas, *cuda], package / "_C.so")


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
