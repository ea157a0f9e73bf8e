"""Selective scan: one public name per operation, several implementations behind it."""

from pathlib import Path

from . import eager
from .ops import selective_scan
from .reference import route_scan_ref, selective_scan_ref
from .route_ops import route_scan

__version__ = Path(__file__).with_name("VERSION").read_text(encoding="utf-8").strip()
__all__ = ["eager", "route_scan", "route_scan_ref", "selective_scan", "selective_scan_ref"]
