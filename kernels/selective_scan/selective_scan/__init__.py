"""Selective scan: one public name per operation, several implementations behind it."""

from . import eager
from .ops import selective_scan
from .reference import route_scan_ref, selective_scan_ref
from .route_ops import route_scan

__all__ = ["eager", "route_scan", "route_scan_ref", "selective_scan", "selective_scan_ref"]
