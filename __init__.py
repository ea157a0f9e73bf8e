"""QuadMamba: a vision backbone that scans a learned quadtree partition of the image."""

from pathlib import Path

_SCAN = Path(__file__).parent / "kernels" / "selective_scan" / "selective_scan"
__version__ = (_SCAN / "VERSION").read_text(encoding="utf-8").strip()  # of both distributions
__all__ = ["QuadMamba", "build_model"]


def __getattr__(name: str) -> object:
    """QuadMamba and build_model, which take torch with them, once they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from quadmamba import models

    return getattr(models, name)
