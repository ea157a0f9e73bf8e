"""Kernels: the selective scan, the quadtree gather and the fused ops around them."""

from importlib.util import find_spec
from pathlib import Path

_OWN = Path(__file__).parent / "selective_scan" / "selective_scan"


def _is_installed() -> bool:
    """Whether Python finds a `selective_scan` of the version of the sources here."""
    spec = find_spec("selective_scan")
    file = Path(spec.origin).with_name("VERSION") if spec and spec.origin else None
    return bool(file) and file.is_file() and file.read_text() == (_OWN / "VERSION").read_text()


if _is_installed():  # the distribution with compiled kernels
    import selective_scan
else:  # the sources here: the kernels that were built in place, or the reference
    from quadmamba.kernels.selective_scan import selective_scan

__all__ = ["selective_scan"]
