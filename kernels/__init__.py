"""Kernels: the selective scan, and the quadtree gather. They import torch and triton, nothing of the project."""

try:  # the installed distribution, with compiled kernels
    import selective_scan
except ModuleNotFoundError:  # the same Python sources in this tree, reference implementations only
    from quadmamba.kernels.selective_scan import selective_scan

__all__ = ["selective_scan"]
