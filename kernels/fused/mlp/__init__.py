"""Two linear layers with a GELU between them, of whose hidden values one copy is kept."""

from quadmamba.kernels.fused.mlp.ops import mlp
from quadmamba.kernels.fused.mlp.reference import mlp_ref

__all__ = ["mlp", "mlp_ref"]
