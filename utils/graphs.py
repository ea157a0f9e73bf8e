"""CUDA graphs: a forward pass, or one with its backward pass, recorded once and replayed.

A replay launches all kernels of the recording at once, so a step no longer waits for the host. The
kernels are the recorded ones on the same addresses: results equal those of the eager mode, random
numbers included, which come from torch's CUDA generator and its seed at the time of the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_WARMUP = 3  # calls before a recording: caches, workspaces and just-in-time kernels are made there


@dataclass
class _Recording:
    """inputs, output: where a replay reads and writes. grads: of the parameters, or empty."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    grads: list[Tensor | None]

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output for other inputs; the next replay overwrites it."""
        for own, given in zip(self.inputs, inputs):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output


class GraphedCall:
    """`call(*tensors)` without gradients as a CUDA graph, recorded for each shape on first use.

    The output belongs to the graph: the next call with this shape overwrites it. Raises ValueError
    for tensors that are not on a GPU.
    """

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self._call = call
        self._kept: dict[Hashable, _Recording] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        key = _key(inputs)
        if key not in self._kept:
            self._kept[key] = _record(self._call, inputs, ())
        return self._kept[key].replay(inputs)


class GraphedBackward:
    """`call(*tensors)`, which returns a loss after its backward pass, as a CUDA graph.

    Recorded for each shape on first use. A call adds to the gradients of `params`, as the eager
    one does; `zero_grad(set_to_none=True)` between steps saves the addition. The loss belongs to
    the graph: the next call overwrites it. Raises ValueError for tensors that are not on a GPU.
    """

    def __init__(self, call: Callable[..., Tensor], params: Sequence[nn.Parameter]) -> None:
        self._call, self._params = call, list(params)
        self._kept: dict[Hashable, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = _key(inputs)
        if key not in self._kept:
            self._kept[key] = _record(self._call, inputs, self._params)
        recording = self._kept[key]
        before = [
            param.grad.clone() if param.grad is grad and grad is not None else param.grad
            for param, grad in zip(self._params, recording.grads)
        ]
        loss = recording.replay(inputs)
        for param, old, new in zip(self._params, before, recording.grads):
            param.grad = new if old is None else old if new is None else old.add_(new)
        return loss


def _key(inputs: Sequence[Tensor]) -> Hashable:
    for tensor in inputs:
        if not tensor.is_cuda:
            raise ValueError(
                f"CUDA graph: expected tensors on a GPU, got one on {tensor.device}; "
                "on a CPU run without graphs"
            )
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)


def _record(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], params: Sequence[nn.Parameter]
) -> _Recording:
    """Record `call` on copies of the inputs; gradients and random states stay what they were."""
    own = [tensor.clone() for tensor in inputs]
    grads, state = [param.grad for param in params], torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            _clear(params)
            call(*own)
        _clear(params)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads may pin memory or wait for an event meanwhile: loader and checkpoint writer
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = call(*own)
    recording = _Recording(graph, own, output, [param.grad for param in params])
    for param, grad in zip(params, grads):
        param.grad = grad
    torch.cuda.set_rng_state(state)
    return recording


def _clear(params: Sequence[nn.Parameter]) -> None:
    for param in params:
        param.grad = None
