"""What ranks exchange where DistributedDataParallel does not: first weights, then gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quadmamba.utils.distributed import World

_BUCKET = 32 * 2**20  # bytes: large enough for the links, small enough to fill one beside a sum


class _Bucket:
    """A flat tensor with a place for each of `like`, which share a dtype and a device.

    A place has the strides that autograd gives the gradient of a parameter, so that copies to and
    from all places are one kernel.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in like]
        self.flat = torch.empty(sum(sizes), dtype=like[0].dtype, device=like[0].device)
        self.places = [
            part.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
            for part, tensor in zip(self.flat.split(sizes), like)
        ]


class GradientMean:
    """The gradients of `params` become their means over the ranks, bit for bit the same on all.

    They are summed in flat buckets of about `bucket_bytes`; one is filled while those before it are
    under way. A gradient that is None on some ranks counts as zeros there. A parameter without one
    on any rank keeps None: the first call finds these, and they may not get a gradient later.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], world: World, *, bucket_bytes: int = _BUCKET
    ) -> None:
        self._params, self._world, self._bucket_bytes = list(params), world, bucket_bytes
        self._buckets: list[tuple[_Bucket, list[Tensor]]] | None = None
        self._unused: list[nn.Parameter] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """Average the gradients in place; all ranks have to call.

        Raises ValueError on a rank where a parameter has a gradient that had none on any at first.
        """
        if self._world.size == 1:
            return
        if self._buckets is None:
            self._buckets = self._agree()
        late = [param.shape for param in self._unused if param.grad is not None]
        if late:
            raise ValueError(
                "expected gradients of the same parameters at each step, got one of a parameter "
                f"of shape {tuple(late[0])} that had none on any rank at the first step"
            )
        under_way = []
        for bucket, params in self._buckets:
            torch._foreach_copy_(bucket.places, _gradients(params))
            bucket.flat.div_(self._world.size)
            under_way.append(dist.all_reduce(bucket.flat, async_op=True))
        for (bucket, params), work in zip(self._buckets, under_way):
            work.wait()
            torch._foreach_copy_(_gradients(params), bucket.places)

    def _agree(self) -> list[tuple[_Bucket, list[Tensor]]]:
        """The buckets, alike on all ranks, of the parameters with a gradient on any of them."""
        ranks = self._world.gather([param.grad is not None for param in self._params])
        used = [any(has) for has in zip(*ranks)]
        self._unused = [param for param, use in zip(self._params, used) if not use]
        params = [param for param, use in zip(self._params, used) if use]
        return [(_Bucket(group), group) for group in _grouped(params, self._bucket_bytes)]


@torch.no_grad()
def share_weights(model: nn.Module, world: World) -> None:
    """Give the model of each rank the parameters and buffers of rank 0's."""
    if world.size == 1:
        return
    for group in _grouped([*model.parameters(), *model.buffers()], _BUCKET):
        bucket = _Bucket(group)
        torch._foreach_copy_(bucket.places, group)
        dist.broadcast(bucket.flat, src=0)
        torch._foreach_copy_(group, bucket.places)


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of `params`; zeros become that of a parameter that has none."""
    grads = []
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        grads.append(param.grad)
    return grads


def _grouped(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, of `limit` bytes together at most or one that is larger."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group: list[Tensor] = []
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if group and sum(t.nbytes for t in group) + tensor.nbytes > limit:
                yield group
                group = []
            group.append(tensor)
        yield group
