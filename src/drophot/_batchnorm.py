"""BatchNorm's running statistics, anew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from drophot._untouched import untouched

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate_bn(model: nn.Module, loader: Iterable[Any]) -> None:
    r"""Set the running statistics of all BatchNorm layers anew from a loader's batches.

    Pruned weights give other activations than those that the running statistics were gathered
    from. One pass puts that right; no weight is touched. The statistics start anew, and each layer
    weighs a batch by its number :math:`n_b` of values a channel, so that a smaller last batch
    counts for what it holds:

    .. math::
        \mu = \sum_b \frac{n_b}{n} \mu_b \qquad \sigma^2 = \sum_b \frac{n_b}{n} \sigma_b^2

    with the mean :math:`\mu_b` and the unbiased variance :math:`\sigma_b^2` of each batch. In the
    pass all BatchNorm layers are in training mode at once, so that each sees what those before it
    make of the same batch; everything else, dropout for one, is in evaluation mode. Batches should
    be as in training: shuffled, and not much smaller.

    Modes, momenta and the random state are put back. A layer that no batch reaches, and layers
    without running statistics, keep what they have.

    References:
        Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, ECCV
        2020, https://arxiv.org/abs/2007.02491 (adaptive batch normalization).

    Args:
        model: Called as `model(inputs)`; what it gives is not looked at.
        loader: Gives batches: the inputs, or a tuple, list or mapping with the inputs first.
            They are moved to the model's device.

    Raises:
        TypeError: If a batch has no tensor of inputs first.
        ValueError: If the model has no BatchNorm layer with running statistics, or one that has
            seen no data yet, the loader is empty, or a batch has one value a channel only. The
            statistics are then what they were, and so they are if the loader or the model raises.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> recalibrate_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
        >>> model.running_mean, model.running_var  # of the means 2 and 6, the variances 2 and 8
        (tensor([4.]), tensor([5.]))
    """
    layers = with_statistics(model)
    if not layers:
        raise ValueError(
            f"`model` should have BatchNorm layers with running statistics. Found none in "
            f"{type(model).__name__}; there is nothing to recalibrate."
        )
    for path, layer in layers.items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise ValueError(
                f"`model` should have the data of its BatchNorm layers. Found `{path}` without; "
                f"run one batch through a lazy module first."
            )
    empty = True
    with untouched(model) as device, _renewed(layers), _eagerly(), _uncached(device):
        for batch in loader:
            empty = False
            model(_inputs(batch).to(device))
        if empty:
            raise ValueError("`loader` should give at least one batch. Found none.")


def with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that remember statistics.

    Args:
        model: The model.

    Returns:
        The layers, by path.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@contextmanager
def _renewed(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """In training mode, each BatchNorm averages over all values since the first batch."""
    momenta = {layer: layer.momentum for layer in layers.values()}
    before = {
        buffer: buffer.clone()
        for layer in layers.values()
        for buffer in (getattr(layer, name) for name in _STATISTICS)
        if buffer is not None
    }
    seen: dict[_BatchNorm, int] = {}

    def weigher(path: str) -> Callable[..., None]:
        def weigh(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs: Tensor = args[0] if args else kwargs["input"]
            values = inputs.numel() // max(1, inputs.shape[1]) if inputs.dim() > 1 else 2
            if values < 2:
                raise ValueError(
                    f"`loader` should give batches with more than one value a channel, or there is "
                    f"no variance. Found an input of shape {tuple(inputs.shape)} to "
                    f"`{path or type(layer).__name__}`; give larger batches, or drop_last=True."
                )
            if layer not in seen:
                layer.reset_running_stats()
            seen[layer] = seen.get(layer, 0) + values
            layer.momentum = values / seen[layer]

        return weigh

    hooks = []
    try:
        for path, layer in layers.items():
            layer.training = True
            hooks.append(layer.register_forward_pre_hook(weigher(path), with_kwargs=True))
        yield
    except BaseException:
        for buffer, values in before.items():
            buffer.copy_(values)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            layer.momentum = momentum


@contextmanager
def _eagerly() -> Iterator[None]:
    """Run compiled models as they are written: each new momentum would be compiled anew."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _uncached(device: torch.device) -> torch.autocast:
    """A surrounding autocast keeps weights that it has cast, those before pruning for one."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=enabled, cache_enabled=False)


def _inputs(batch: Any) -> Tensor:
    first = batch
    if isinstance(batch, Mapping):
        first = next(iter(batch.values()), None)
    elif isinstance(batch, tuple | list):
        first = batch[0] if batch else None
    if not isinstance(first, Tensor):
        raise TypeError(
            f"`loader` should give batches with a tensor of inputs first. Found "
            f"{type(first).__name__} in a {type(batch).__name__}; wrap the loader in one that does."
        )
    return first
