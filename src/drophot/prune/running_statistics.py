"""Mean and variance of the inputs of normalization layers, over many batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_SIGNATURES = {
    function: inspect.signature(function) for function in (F.batch_norm, F.instance_norm)
}


@dataclass(slots=True)
class Sums:
    """Sums over the inputs of one layer."""

    mean: Tensor
    """The sum of the batches' means, each times its number of values per channel."""
    variance: Tensor
    """The same sum of their unbiased variances."""
    values: int = 0
    """The number of values per channel."""
    calls: int = 0
    """The number of batches."""


def with_statistics(model: nn.Module) -> dict[str, _NormBase]:
    """The normalization layers with running statistics, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm | _InstanceNorm) and module.running_mean is not None
    }


@contextmanager
def gathered(layers: Mapping[str, _NormBase]) -> Iterator[dict[str, Sums]]:
    """Put layers in training mode and yield the sums of each layer that has been called, by path.

    Statistics are computed in float32 or wider and added in float64, whatever the dtype of the
    layer's buffers. The buffers are restored at the end.
    """
    momenta = {layer: layer.momentum for layer in layers.values()}
    before = [(buffer, buffer.clone()) for layer in layers.values() for buffer in _buffers(layer)]
    mode = _Gather(layers)
    hooks = []
    local = [layer for layer in layers.values() if _is_synchronised(layer)]
    try:
        for layer in local:  # otherwise it waits for ranks that have fewer batches
            layer.forward = _local_forward(layer)
        for path, layer in layers.items():
            layer.training = True
            layer.momentum = 1.0  # so that the buffers of custom layers hold the last batch
            hooks.append(layer.register_forward_pre_hook(mode.enter(path), with_kwargs=True))
            hooks.append(layer.register_forward_hook(mode.leave(path, layer), with_kwargs=True))
        with mode:
            yield mode.sums
    finally:
        for hook in hooks:
            hook.remove()
        for layer in local:
            del layer.forward
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for buffer, values in before:
            buffer.copy_(values)


class _Gather(TorchFunctionMode):
    """Adds up the statistics of the inputs to batch_norm and instance_norm for some layers."""

    def __init__(self, layers: Mapping[str, _NormBase]) -> None:
        super().__init__()
        self.sums: dict[str, Sums] = {}
        self._paths = {id(layer.running_mean): path for path, layer in layers.items()}
        self._seen: dict[str, tuple[int, list[Tensor]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            given = _SIGNATURES[func].bind(*args, **kwargs)
            given.apply_defaults()
            path = self._paths.get(id(given.arguments["running_mean"]))
            batchwise = func is F.batch_norm
            if path is not None and given.arguments["training" if batchwise else "use_input_stats"]:
                self._add(path, given.arguments["input"], batchwise)
        return func(*args, **kwargs)

    def enter(self, path: str) -> Any:
        """A hook to run before the call of a layer."""

        def remember(layer: Any, args: Any, kwargs: Any) -> None:
            calls = self.sums[path].calls if path in self.sums else 0
            self._seen[path] = calls, [buffer.clone() for buffer in _buffers(layer)[:2]]

        return remember

    def leave(self, path: str, layer: _NormBase) -> Any:
        """A hook to run after the call, for layers that compute their statistics themselves."""

        def compare(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls, before = self._seen.pop(path)
            if path in self.sums and self.sums[path].calls > calls:
                return
            mean, variance = _buffers(layer)[:2]
            if not all(torch.equal(a, b) for a, b in zip(before, (mean, variance), strict=True)):
                values = args[0] if args else next(iter(kwargs.values()))
                _check(path, values)
                self._sum(path, mean, variance, values.numel() // values.shape[1])

        return compare

    def _add(self, path: str, values: Tensor, batchwise: bool) -> None:
        if batchwise:
            _check(path, values)
        exact = values if values.dtype in (torch.float32, torch.float64) else values.float()
        over = [dim for dim in range(values.dim()) if dim != 1 and (batchwise or dim)]
        variance, mean = torch.var_mean(exact, over, correction=1)
        if not batchwise:  # of each instance, then their mean
            variance, mean = variance.mean(0), mean.mean(0)
        self._sum(path, mean, variance, values.numel() // values.shape[1])

    def _sum(self, path: str, mean: Tensor, variance: Tensor, count: int) -> None:
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        mean, variance = mean.to(wide), variance.to(wide)
        if path not in self.sums:
            self.sums[path] = Sums(torch.zeros_like(mean), torch.zeros_like(mean))
        sums = self.sums[path]
        sums.mean += mean * count
        sums.variance += variance * count
        sums.values += count
        sums.calls += 1


def _buffers(layer: Any) -> list[Tensor]:
    return [buffer for name in BUFFERS if (buffer := getattr(layer, name)) is not None]


def _is_synchronised(layer: Any) -> bool:
    own = nn.SyncBatchNorm.forward
    return isinstance(layer, nn.SyncBatchNorm) and type(layer).forward is own


def _local_forward(layer: Any) -> Any:
    """The forward of SyncBatchNorm without the other ranks."""

    def forward(input: Tensor) -> Tensor:
        layer._check_input_dim(input)
        layer._check_non_zero_input_channels(input)
        return F.batch_norm(
            *(input, layer.running_mean, layer.running_var, layer.weight, layer.bias),
            training=layer.training,
            momentum=1.0,
            eps=layer.eps,
        )

    return forward


def _check(path: str, values: Tensor) -> None:
    if values.dim() > 1 and values.numel() // max(1, values.shape[1]) < 2:
        raise ValueError(
            f"`loader` must yield batches with more than one value per channel, since one value "
            f"has no variance, got an input of shape {tuple(values.shape)} to "
            f"`{path or 'the model'}`. Use larger batches, or drop_last=True."
        )
