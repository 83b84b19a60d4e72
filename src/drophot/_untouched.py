"""Look at a model without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
