"""Selective scan over the quadtree sequence, which is never written."""

from quadmamba.kernels.quadtree_scan.ops import quadtree_scan
from quadmamba.kernels.quadtree_scan.reference import quadtree_scan_ref

__all__ = ["quadtree_scan", "quadtree_scan_ref"]
