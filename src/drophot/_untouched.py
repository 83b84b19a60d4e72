"""Look at a model without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from drophot import _random


@contextmanager
def untouched(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, from which the model comes back as it was.

    Every submodule's own mode is put back (a frozen BatchNorm stays frozen), and so are the random
    generators, which merely iterating a DataLoader moves on: training goes on as if nobody had
    looked.

    Args:
        model: The model to look at.

    Yields:
        The device that the model's parameters are on.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _random.kept(device), torch.no_grad():
            yield device
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def followed(
    model: nn.Module, enter: Callable[[str], object], leave: Callable[[], object]
) -> Iterator[None]:
    """Be told when a call enters one of the model's modules, and when it leaves it.

    Args:
        model: The model.
        enter: Called with the module's path.
        leave: Called at the module's end, the last one that was entered first.

    Yields:
        Nothing; the hooks come off again, also after an error.
    """

    def hook(path: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            enter(path)

        return before

    def after(*_: Any) -> None:
        leave()

    hooks = [
        handle
        for path, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(hook(path)),
            module.register_forward_hook(after),
        )
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
