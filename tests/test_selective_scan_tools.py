"""The report (doctor) of the selective_scan distribution, and what a library of it holds."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from quadmamba.kernels import selective_scan as package

doctor = importlib.import_module(f"{package.__name__}.doctor")
library = importlib.import_module(f"{package.__name__}.library")
needs_build = pytest.mark.skipif(library.LOAD_ERROR is not None, reason="needs the built library")


def test_doctor_fits_one_screen():
    lines: list[str] = []
    code = doctor.main(lines.append)
    text = "".join(lines)
    assert len(text.splitlines()) <= 24
    assert code == ("nothing is missing" not in text)
    assert all(name in text for name in ("torch", "library", "selective_scan_fwd", "nvcc"))
    assert "WRONG" not in text


def test_doctor_without_library_says_how_to_build(monkeypatch):
    monkeypatch.setattr(library, "LOAD_ERROR", "not built")
    lines: list[str] = []
    assert doctor.main(lines.append) == 1
    assert library.BUILD_COMMAND in "".join(lines)


ARCHES = {
    "exact": ((9, 0), "8.0 9.0", True),
    "later minor": ((8, 9), "8.0", True),
    "earlier minor": ((8, 0), "8.6", False),
    "PTX": ((12, 0), "8.0 9.0+PTX", True),
    "no PTX": ((12, 0), "8.0 9.0", False),
    "too old": ((7, 5), "8.0+PTX", False),
}


@pytest.mark.parametrize(("capability", "arches", "covered"), ARCHES.values(), ids=ARCHES.keys())
def test_doctor_knows_which_gpus_are_covered(capability, arches, covered):
    assert doctor.has_code_for(capability, arches) is covered


@needs_build
def test_a_library_of_older_sources_says_so():
    assert library.kernels_for("no_such_op") == frozenset()
    assert "lacks no_such_op: it was built from older sources" in library.missing("no_such_op")
    assert library.missing("selective_scan_fwd") is None
    assert library.missing("selective_scan_fwd", "keep_states") is None
    expected = "lacks the keep_all of selective_scan_fwd: it was built from older sources"
    assert expected in library.missing("selective_scan_fwd", "keep_all")


# ------------------------------------------------------------------ more than one copy about
def copy_at(folder, version, text="x = 1"):
    package = folder / "selective_scan"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    if version:
        (package / "VERSION").write_text(version + "\n")
    return package


COPIES = {  # version and text of the installed copy, which copy is taken, what is to be done
    "same": ("2.0", "x = 1", "installed", None),
    "edited": ("2.0", "x = 2", "installed", "differs from"),
    "older": ("1.9", "x = 1", "sources", "is 1.9: pip uninstall it, then pip install"),
    "another project": (None, "x = 1", "sources", "is of unknown version: pip uninstall it"),
}


@pytest.mark.parametrize("case", COPIES)
def test_C2_the_installed_copy_is_taken_if_it_is_of_the_version_of_the_sources(case, tmp_path):
    version, text, taken, todo = COPIES[case]
    copies = {"installed": copy_at(tmp_path / "site", version, text)}
    copies["sources"] = copy_at(tmp_path / "tree", "2.0")
    assert doctor.taken_copy(**copies) == copies[taken]
    advice = list(doctor.advice_on_copies(**copies))
    assert len(advice) == (todo is not None)
    assert todo is None or todo in advice[0]
    assert doctor.taken_copy(None, copies["sources"]) == copies["sources"]
    assert list(doctor.advice_on_copies(None, copies["sources"])) == []
    assert list(doctor.advice_on_copies(copies["sources"], copies["sources"])) == []


def test_C2_two_distributions_that_own_the_same_files_are_named(tmp_path, monkeypatch):
    package = copy_at(tmp_path, "2.0")
    for name in ("new_scan", "old_scan"):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "RECORD").write_text("selective_scan/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.owners_of(package) == ["new_scan", "old_scan"]
    advice = list(doctor.advice_on_copies(package, package))
    assert "several own" in advice[0]
    assert "pip uninstall new_scan old_scan, then pip install" in advice[0]


def test_C2_the_reason_for_no_kernels_names_a_copy_of_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "PATH", tmp_path / "_C.so")
    monkeypatch.setattr(library, "installed", lambda: copy_at(tmp_path, "0.0.1"))
    found = library._load()
    assert "_C.so does not exist (not built)" in found
    assert f"the copy in {tmp_path}/selective_scan is 0.0.1, not {package.__version__}" in found


def test_C2_a_package_of_another_project_is_not_imported(tmp_path):
    copy_at(tmp_path, None, "raise RuntimeError('of another project')")
    code = "from quadmamba.kernels import selective_scan as s; print(s.__version__, s.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    own = "quadmamba.kernels.selective_scan.selective_scan"
    assert done.stdout == f"{package.__version__} {own}\n", done.stderr
