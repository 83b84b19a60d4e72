"""BatchNorm statistics anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from drophot._untouched import untouched


def recalibrate_bn(model: nn.Module, loader: Iterable[Any]) -> None:
    """Take BatchNorm's running statistics anew from data, and touch no weight.

    After pruning, a layer's outputs no longer have the mean and the variance that its BatchNorm
    remembers; one pass over training data mends that, without a label or a gradient. All BatchNorm
    layers see the data in one pass, each as the layers before it now give it. Batches count by
    their number of samples. Everything else comes back as it was: modes, momentum, random state.

    References:
        Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, ECCV
        2020, https://arxiv.org/abs/2007.02491.

    Args:
        model: On any device.
        loader: Batches as the model is trained on: a tensor of inputs, or a tuple or list whose
            first element is one. Training data, some hundred samples or more.

    Raises:
        TypeError: If a batch is neither.
        ValueError: If the model has no BatchNorm with running statistics, or the loader no batch.
            When this or the model raises, the statistics are those from before.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> recalibrate_bn(model, [torch.randn(64, 2), torch.randn(64, 2)])
        >>> bool((model[1].running_mean != 0).all())
        True
    """
    layers = with_statistics(model)
    if not layers:
        raise ValueError(
            f"`model` should have BatchNorm layers with running statistics. Found none in "
            f"{type(model).__name__}; there is nothing to recalibrate."
        )
    before = [
        (layer, layer.momentum, {name: t.clone() for name, t in layer.named_buffers()})
        for layer in layers
    ]
    done = False
    try:
        with untouched(model) as device:
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
            seen = 0
            for batch in loader:
                inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not isinstance(inputs, Tensor):
                    raise TypeError(
                        f"`loader` should give tensors of inputs, or tuples that begin with one. "
                        f"Found {type(inputs).__name__}."
                    )
                seen += len(inputs)
                for layer in layers:
                    layer.momentum = len(inputs) / seen if len(inputs) else 0.0
                model(inputs.to(device))
        if not seen:
            raise ValueError("`loader` should have samples. Found none.")
        done = True
    finally:
        for layer, momentum, buffers in before:
            layer.momentum = momentum
            if not done:
                for name, buffer in layer.named_buffers():
                    with torch.no_grad():
                        buffer.copy_(buffers[name])


def with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that remember statistics.

    Args:
        model: The model.

    Returns:
        The layers.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
