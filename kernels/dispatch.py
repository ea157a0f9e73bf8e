"""How ops are registered: with torch.library, and with a short way for plain eager calls."""

from quadmamba.kernels import selective_scan

EagerOp = selective_scan.eager.EagerOp
triton_op = selective_scan.eager.triton_op
