"""What every Triton op shares: the late import of its kernels, and the size of a grid."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

MAX_PARTIALS = (
    132 * 16
)  # rows of partial sums: enough to fill the largest GPUs, few enough to add up
SIZES = 1024  # of tensors, for which a package keeps its launches ready
_NOWHERE = nullcontext()


@cache
def triton_kernels(package: str, module: str = "triton") -> ModuleType:
    """The module of a kernel package that launches its Triton kernels, imported on first use.

    Raises RuntimeError where Triton itself is not installed.
    """
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise RuntimeError(
            f"{package}: expected Triton for CUDA tensors, got no such package; "
            "run `pip install triton`, or move the tensors to the CPU"
        ) from error
    return importlib.import_module(f"{package}.{module}")


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """`torch.cuda.device_of(x)`, but nothing to enter where that is the current device already."""
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
        return _NOWHERE
    return torch.cuda.device_of(x)


def ceil_div(a: int, b: int) -> int:
    """Number of blocks of b that cover a."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is n or more; Triton's own takes microseconds."""
    return 1 << max(n - 1, 0).bit_length()


def row_block(d: int, tile: int) -> tuple[int, int]:
    """Rows and columns of a block of whole rows of d numbers, about `tile` in all."""
    columns = power_of_2(d)
    return max(1, tile // columns), columns


def row_warps(columns: int, least: int) -> int:
    """Warps for a block that is a single row."""
    return min(16, max(least, columns // 512))


def check_half_or_single(op: str, *tensors: Tensor) -> None:
    """Raise ValueError unless every tensor is float16, bfloat16 or float32."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(
                f"{op}: expected float16, bfloat16 or float32 on CUDA, got {tensor.dtype}"
            )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of autocast where it is on for the device of x, else that of x."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def empty_rows(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor of the shape of `like`."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """x (..., c) as (rows, c)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product a b in float32, or float64; sums of half precision are not rounded to it."""
    if a.dtype == torch.float64:
        return a @ b
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient (n, c) of a linear layer's weight in `dtype`, as a sum in float32.

    grad: (..., n) of its output. x: (..., c), its input.
    """
    found = product_float32(as_rows(grad).t(), as_rows(x))
    return found if found.dtype == dtype else found.to(dtype)
