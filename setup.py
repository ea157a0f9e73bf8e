"""Install the repository root as the package `quadmamba`."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGES = {
    "quadmamba": ".",
    "quadmamba.configs": "configs",
    "quadmamba.models": "models",
    "quadmamba.kernels": "kernels",
    "quadmamba.kernels.selective_scan": "kernels/selective_scan",
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

setup(
    name="quadmamba",
    version="0.1.0",
    description="QuadMamba: a vision backbone with a learned quadtree scan, and its training code",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    install_requires=(ROOT / "requirements.txt").read_text().splitlines(),
    extras_require={
        "demo": ["scikit-learn"],
        "dev": ["mutmut", "pytest", "pytest-timeout", "ruff", "scikit-learn"],
    },
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"quadmamba.configs": ["*.yaml"]},
)
