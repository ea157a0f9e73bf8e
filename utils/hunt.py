"""Find where numbers stop being finite, by running a batch again with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def first_not_finite(model: nn.Module, replay: Callable[[], Tensor]) -> str:
    """Where the first number that is not finite arises; "" where all are finite.

    replay: runs a batch forward through `model` and its loss backward, and returns the loss.
    Looks at the parameters, then at the outputs of the modules in the order in which they run, at
    the loss, and at last at the gradients of the outputs in backward order.
    """
    spoiled = [name for name, param in model.named_parameters() if not _finite(param)]
    if spoiled:
        return f"parameter {spoiled[0]} ({len(spoiled)} parameters in all)"
    outputs: list[str] = []
    gradients: list[str] = []
    handles = [
        module.register_forward_hook(_hook(name, outputs, gradients))
        for name, module in model.named_modules()
    ]
    try:
        loss = replay()
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return f"output of module {outputs[0]}"
    if not _finite(loss):
        return "loss, of finite outputs"
    if gradients:
        return f"gradient of the output of module {gradients[0]}"
    params = [n for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return f"gradient of parameter {params[0]}" if params else ""


def _hook(
    name: str, outputs: list[str], gradients: list[str]
) -> Callable[[nn.Module, object, object], None]:
    def look(module: nn.Module, inputs: object, result: object) -> None:
        del inputs
        label = f"{name or 'the whole model'} ({type(module).__name__})"

        def look_back(gradient: Tensor) -> None:
            if not _finite(gradient):
                gradients.append(label)

        for value in _tensors(result):
            if not _finite(value):
                outputs.append(label)
            if value.requires_grad:
                value.register_hook(look_back)

    return look


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
