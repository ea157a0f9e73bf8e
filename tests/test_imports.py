"""Imports point one way, and importing a module changes nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # which parts of the project each part may import
    "configs": set(),
    "kernels": set(),
    "models": {"kernels"},
    "data": set(),
    "utils": {"configs", "data", "models"},
    "main": {"configs", "models", "utils"},
    "tools": {"configs", "data", "kernels", "main", "models", "utils"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    files = [ROOT / "main.py"] if part == "main" else sorted((ROOT / part).rglob("*.py"))
    files = [path for path in files if path.name != "setup.py"]
    assert files
    for path in files:
        for name in imports(path):
            if name.startswith("quadmamba."):
                assert name.split(".")[1] in ALLOWED[part] | {part}, f"{path}: imports {name}"
            elif part in ("configs", "kernels"):
                third_party = {"timm", "fvcore", "torchvision", "tensorboard", "termcolor"}
                assert name.split(".")[0] not in third_party, f"{path}: imports {name}"


def test_W8_one_module_reads_images():
    readers = ("Image.open", "decode_jpeg", "read_file", "decode_image", "default_loader", "imread")
    found = [
        path.relative_to(ROOT)
        for part in ("data", "models", "tools", "utils")
        for path in sorted((ROOT / part).rglob("*.py"))
        if any(name in path.read_text() for name in readers)
    ]
    assert found == [Path("data/images.py")]


def test_no_generic_name_is_installed():
    source = (ROOT / "setup.py").read_text()
    packages = ast.literal_eval(source.split("PACKAGES = ")[1].split("\n\n")[0])
    assert all(name == "quadmamba" or name.startswith("quadmamba.") for name in packages)
    for folder in packages.values():
        assert (ROOT / folder).is_dir()
    listed = {(ROOT / folder).resolve() for folder in packages.values()}
    for part in ("configs", "models", "kernels", "data", "tools", "utils"):
        for path in (ROOT / part).rglob("__init__.py"):
            assert path.parent.resolve() in listed or "build" in path.parts, path
