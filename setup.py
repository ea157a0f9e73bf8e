"""Install the repository root as the package `quadmamba`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SCAN = "quadmamba.kernels.selective_scan.selective_scan"
PACKAGES = {
    "quadmamba": ".",
    "quadmamba.configs": "configs",
    "quadmamba.models": "models",
    "quadmamba.kernels": "kernels",
    "quadmamba.kernels.selective_scan.selective_scan": "kernels/selective_scan/selective_scan",
    "quadmamba.kernels.quadtree_gather": "kernels/quadtree_gather",
    "quadmamba.kernels.quadtree_scan": "kernels/quadtree_scan",
    "quadmamba.kernels.fused": "kernels/fused",
    "quadmamba.kernels.fused.bias_norm": "kernels/fused/bias_norm",
    "quadmamba.kernels.fused.dwconv_silu": "kernels/fused/dwconv_silu",
    "quadmamba.kernels.fused.layer_norm": "kernels/fused/layer_norm",
    "quadmamba.kernels.fused.linear": "kernels/fused/linear",
    "quadmamba.kernels.fused.mlp": "kernels/fused/mlp",
    "quadmamba.kernels.fused.patch_norm": "kernels/fused/patch_norm",
    "quadmamba.kernels.fused.predictor": "kernels/fused/predictor",
    "quadmamba.kernels.fused.quadrant_choice": "kernels/fused/quadrant_choice",
    "quadmamba.kernels.fused.scaled_add": "kernels/fused/scaled_add",
    "quadmamba.kernels.nodes": "kernels/nodes",
    "quadmamba.data": "data",
    "quadmamba.tools": "tools",
    "quadmamba.utils": "utils",
}


def read(path: str) -> str:
    """The text of a file of this folder."""
    return (ROOT / path).read_text(encoding="utf-8")


class BuildPackage(build_py):
    """`build_py` without this file, which lies where the package does."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each module."""
        found = super().find_package_modules(package, package_dir)
        return [item for item in found if Path(item[2]).resolve() != Path(__file__).resolve()]


setup(
    name="quadmamba",
    version=read(f"{PACKAGES[SCAN]}/VERSION").strip(),
    description="QuadMamba: a vision backbone with a learned quadtree scan, and its training code",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    keywords=["quadmamba", "vision", "backbone", "state space model", "selective scan"],
    python_requires=">=3.10",
    install_requires=read("requirements.txt").splitlines(),
    extras_require={
        "demo": ["scikit-learn>=1.3"],
        "dev": [
            "coverage",
            "libcst",
            "mutmut",
            "pytest",
            "pytest-timeout",
            "ruff",
            "scikit-learn>=1.3",
        ],
    },
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"quadmamba.configs": ["*.yaml"], SCAN: ["VERSION"]},
    entry_points={"console_scripts": ["quadmamba = quadmamba.main:program"]},
    cmdclass={"build_py": BuildPackage},
)
