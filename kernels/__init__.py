"""Kernels: the selective scan, the quadtree gather and the fused ops around them."""

try:  # the installed distribution, with compiled kernels
    import selective_scan
except ModuleNotFoundError:  # the same Python sources in this tree, reference implementations only
    from quadmamba.kernels.selective_scan import selective_scan

__all__ = ["selective_scan"]
