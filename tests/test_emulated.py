"""The CUDA kernels of selective_scan, run by the emulator on a CPU: numbers and missing waits."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # brings the headers of CUDA
import emulate
from runs import passed

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
ROOT = Path(__file__).resolve().parent.parent
MODULES = ("test_selective_scan.py", "test_route_scan.py", "test_quadtree_scan.py")


@pytest.fixture(scope="module")
def folder():
    return ROOT / "build" / "emulated"


@pytest.fixture(scope="module")
def selftest(folder):
    emulate.translate(folder / "csrc")
    names = ["emulator.cpp", "selftest.cu"]
    library = ctypes.CDLL(str(emulate.link(folder / "csrc", names, folder / "selftest.so")))
    for name in ("sum", "copy", "part", "wait_for_ever"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("wait", [True, False])
def test_a_missing_barrier_shows(selftest, wait):
    out = (ctypes.c_int * 64)()
    assert selftest.sum(out, wait) == b""
    assert (list(out) == [64] * 64) == wait


@pytest.mark.parametrize("wait", [True, False])
def test_a_copy_that_is_not_waited_for_shows(selftest, wait):
    out, numbers = (ctypes.c_int * 64)(), (ctypes.c_int * 64)(*range(64))
    assert selftest.copy(out, numbers, wait) == b""
    assert (list(out) == list(range(64))) == wait


def test_lanes_that_part_are_an_error(selftest):
    assert b"lanes of a warp part" in selftest.part((ctypes.c_int * 64)())


def test_threads_that_wait_for_ever_are_an_error(selftest):
    expected = b"emulator: 64 threads wait for ever, in barrier 1 (64 of 128)"
    assert selftest.wait_for_ever() == expected


RUN = """
import sys, pytest, torch
from selective_scan import library
torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
assert library.LOAD_ERROR is None and str(library.PATH).startswith(sys.argv[1]), library.PATH
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings", [{}, {"MULTIPROCESSORS": "1", "SEED": "1"}], ids=["h200", "one"]
)
def test_kernels_match_their_references(folder, settings):
    emulate.build(folder)
    env = {**os.environ, **{f"EMULATOR_{name}": value for name, value in settings.items()}}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    modules = [str(ROOT / "tests" / name) for name in (MODULES[1:2] if settings else MODULES)]
    choice = "cpu and both_ways and not float32" if settings else "cpu"
    command = [sys.executable, "-c", RUN, str(folder), *modules, "-k", choice]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert passed(done) >= (8 if settings else 150)
