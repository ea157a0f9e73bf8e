"""QuadMamba: a vision backbone that scans a learned quadtree partition of the image."""

from quadmamba.models import QuadMamba, build_model

__all__ = ["QuadMamba", "build_model"]
