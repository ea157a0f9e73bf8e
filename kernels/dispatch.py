"""How ops are registered: with torch.library, and with a short way for plain eager calls."""

from quadmamba.kernels import selective_scan

AUTOCAST = selective_scan.eager.AUTOCAST
EagerOp = selective_scan.eager.EagerOp
Kernel = selective_scan.eager.Kernel
triton_op = selective_scan.eager.triton_op
unwatched = selective_scan.eager.unwatched
