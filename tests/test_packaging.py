"""Both source distributions, the wheels that are built from them, and life without the checkout."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from functools import cache
from pathlib import Path

import pytest

import quadmamba

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "kernels/selective_scan"
# Not sources: what git, CI, tools and runs put into a checkout
LEFT_OUT = (".*", "build", "dist", "output", "datasets", "shared", "__pycache__", "*.egg-info")
PARTS = ("configs", "data", "kernels", "models", "tools", "utils")
PIP = ("-m", "pip", "--disable-pip-version-check", "-q")
FROM_HERE = ("--no-deps", "--no-index")


def python(*arguments: object, cwd: Path, **environment: str) -> str:
    """What a Python process says on both streams; fails with it where the process fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files_in(folder: Path) -> set[str]:
    """Paths below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The checkout as a download holds it: without .git and without anything built."""
    ignore = shutil.ignore_patterns(*LEFT_OUT, "*.so", "*.pyc")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("a b") / "checkout", ignore=ignore))


@pytest.fixture(scope="module")
def sdists(checkout, tmp_path_factory):
    """The unpacked source distributions: of the root, and of the kernels."""
    out = tmp_path_factory.mktemp("sdists")
    for folder in (checkout, checkout / KERNELS):
        python("setup.py", "-q", "sdist", "-d", out, cwd=folder)
    for path in out.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            archive.extractall(out, filter="data")
    root, kernels = sorted(
        (path for path in out.iterdir() if path.is_dir()), key=lambda p: len(p.name)
    )
    return root, kernels


@pytest.fixture(scope="module")
def wheels(sdists, tmp_path_factory):
    """The wheels of both, built from the source distributions; without nvcc."""
    out = tmp_path_factory.mktemp("wheels")
    build = (*PIP, "wheel", *FROM_HERE, "--no-build-isolation", "-w", out)
    for folder in sdists:
        python(*build, folder, cwd=out, CUDA_HOME=str(out), MAX_JOBS="2")
    return sorted(out.glob("*.whl"), key=lambda path: len(path.name))


@pytest.fixture(scope="module")
def site(wheels, tmp_path_factory):
    """A folder with both wheels installed."""
    target = tmp_path_factory.mktemp("site")
    python(*PIP, "install", *FROM_HERE, "--target", target, *wheels, cwd=target)
    return target


def test_C2_the_sdists_hold_all_that_a_checkout_holds(checkout, sdists):
    added = r"PKG-INFO|setup\.cfg|[^/]*\.egg-info/.*"
    for folder, sdist in zip((checkout, checkout / KERNELS), sdists):
        found = {name for name in files_in(sdist) if not re.fullmatch(added, name)}
        made = {name for name in files_in(folder) if ".egg-info" in name}
        assert found == files_in(folder) - made
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / KERNELS / "LICENSE").read_bytes()


def test_C2_the_wheels_are_complete(checkout, wheels):
    names = [set(zipfile.ZipFile(path).namelist()) for path in wheels]
    contents = [{name for name in found if ".dist-info/" not in name} for found in names]
    package = {"__init__.py", "main.py", f"{KERNELS}/selective_scan/VERSION"}
    package |= {str(path.relative_to(checkout)) for path in (checkout / "configs").glob("*.yaml")}
    for part in PARTS:
        package |= {str(path.relative_to(checkout)) for path in (checkout / part).rglob("*.py")}
    package.remove(f"{KERNELS}/setup.py")
    assert contents[0] == {f"quadmamba/{name}" for name in package}
    scan = files_in(checkout / KERNELS / "selective_scan")
    assert contents[1] == {f"selective_scan/{name}" for name in {*scan, "_C.so"}}
    assert wheels[0].name.endswith("-py3-none-any.whl")
    assert re.search("-py3-none-linux_.*.whl", wheels[1].name)


def test_C2_the_metadata_is_complete(wheels):
    for path, name in zip(wheels, ("quadmamba", "quadmamba-selective-scan")):
        wheel = zipfile.ZipFile(path)
        folder = next(n for n in wheel.namelist() if n.endswith("/METADATA")).rpartition("/")[0]
        about = message_from_string(wheel.read(f"{folder}/METADATA").decode())
        assert (about["Name"], about["Version"]) == (name, quadmamba.__version__)
        assert about["Summary"]
        assert about["Requires-Python"] == ">=3.10"
        assert about.get_all("License-File") == ["LICENSE", "NOTICE"]
        assert "torch>=2.10" in about.get_all("Requires-Dist")
        assert "selective scan" in about.get_payload()


RUN = """
import contextlib, importlib.metadata, io, pathlib, pkgutil, runpy, sys, warnings
warnings.simplefilter("error", RuntimeWarning)
import quadmamba, quadmamba.main, quadmamba.tools, quadmamba.kernels as kernels
from quadmamba.configs import load_cfg
from quadmamba.kernels import selective_scan
from quadmamba.utils.versions import versions

site = pathlib.Path(sys.argv[1])
for module in (quadmamba, selective_scan):
    assert site in pathlib.Path(module.__file__).parents, module.__file__
assert pathlib.Path(selective_scan.__file__).parent == site / "selective_scan"
for name in ("quadmamba", "quadmamba-selective-scan"):
    assert importlib.metadata.version(name) == quadmamba.__version__, name
assert selective_scan.__version__ == versions()["quadmamba"] == quadmamba.__version__
assert load_cfg("configs/quadmamba_small.yaml") == load_cfg("quadmamba_small")
assert load_cfg("vmamba_tiny").MODEL.NAME == "vmamba_tiny"
for tool in pkgutil.iter_modules(quadmamba.tools.__path__):
    sys.argv = [tool.name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_module(f"quadmamba.tools.{tool.name}", run_name="__main__")
    print(tool.name, "usage" in said.getvalue())
assert quadmamba.main.main(["--info", "--cfg", "quadmamba_lite"]) == 0
"""


def test_M8_the_wheels_run_from_an_empty_folder(site, tmp_path):
    said = python("-c", RUN, site, cwd=tmp_path, PYTHONPATH=str(site))
    for tool in ("ablate", "check_data", "import_release", "make_digits", "visualize"):
        assert f"{tool} True" in said
    assert '"params": 5470200' in said
    doctor = python("-m", "selective_scan.doctor", cwd=tmp_path, PYTHONPATH=str(site))
    assert re.search(rf"quadmamba takes +{site}/selective_scan\n", doctor)
    assert "none: CPU kernels only" in doctor
    assert "test cpu             ok" in doctor
    with pytest.raises(AssertionError, match="packaged, by name: .*quadmamba_small") as failed:
        python(site / "bin" / "quadmamba", "--cfg", "none", cwd=tmp_path, PYTHONPATH=str(site))
    assert "Traceback" not in str(failed.value)
    assert not any(tmp_path.iterdir())


def test_M8_main_of_another_folder_says_which_package_runs(tmp_path):
    copied = shutil.copy(ROOT / "main.py", tmp_path)
    for path, count in ((copied, 1), (ROOT / "main.py", 0)):
        with pytest.raises(AssertionError, match="no such file: none") as failed:
            python(path, "--cfg", "none", cwd=tmp_path)
        warning = f"running the quadmamba in {ROOT}; changes in {tmp_path} are not seen"
        assert str(failed.value).count(warning) == count


# ---------------------------------------------------------------------------- what is required
THROUGH = {"torch.utils.tensorboard": "tensorboard"}  # imported by what we import
EXTRAS = {"tools": "demo", "benchmarks": "demo", "tests": "dev"}


distributions = cache(importlib.metadata.packages_distributions)


def imported(path: Path) -> set[str]:
    """Distributions that a file imports from, by normalised name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    names = {THROUGH.get(name, name).split(".")[0] for name in names}
    own = {path.stem for path in (ROOT / "tests").glob("*.py")}
    own |= {"benchmarks", "quadmamba", "selective_scan", "tests"}
    known = distributions()
    found = {known[name][0] if name in known else name for name in names - own}
    return {normalised(name) for name in found - sys.stdlib_module_names}


def normalised(requirement: str) -> str:
    """The name of the distribution that a requirement names."""
    return re.sub("[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def required() -> dict[str, set[str]]:
    """Names in requirements.txt, under "", and in each extra of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    keywords = {node.arg: node.value for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    lists = {"": (ROOT / "requirements.txt").read_text().splitlines()}
    lists |= ast.literal_eval(keywords["extras_require"])
    return {extra: {normalised(line) for line in lines} for extra, lines in lists.items()}


def test_M8_requirements_name_what_is_imported_and_nothing_else():
    lists, used, unnamed = required(), set(), {}
    for part in (*PARTS, "main.py", "benchmarks", "tests"):
        paths = [ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py"))
        for path in paths:
            if path.name == "setup.py" or "build" in path.relative_to(ROOT).parts:
                continue
            found = imported(path)
            used |= found if part in (*PARTS, "main.py") else set()
            allowed = lists[""] | lists.get(EXTRAS.get(part, ""), set())
            if found - allowed:
                unnamed[str(path)] = found - allowed
    assert unnamed == {}
    assert used - lists["demo"] == lists[""]
    pinned = {normalised(line) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    assert set.union(*lists.values()) <= pinned
