"""Recompute the running statistics of BatchNorm layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from drophot._core import distributed
from drophot._core.model_contexts import evaluating
from drophot.prune.calibration import inputs_of, merged, unwrapped
from drophot.prune.eager_mode import eagerly, uncached
from drophot.prune.running_statistics import Sums, gathered, with_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def recalibrate_bn(
    model: nn.Module, loader: Iterable[Any], *, group: ProcessGroup | None = None
) -> None:
    r"""Recompute the running statistics of all BatchNorm layers from a loader's batches.

    Pruning changes the activations, so the running statistics of the dense model no longer describe
    them. One pass over training data corrects that; no weight is changed. The old statistics are
    discarded, and each batch is weighted by its number :math:`n_b` of values per channel, so that a
    smaller last batch counts less:

    .. math::
        \mu = \sum_b \frac{n_b}{n} \mu_b \qquad \sigma^2 = \sum_b \frac{n_b}{n} \sigma_b^2

    with the mean :math:`\mu_b` and the unbiased variance :math:`\sigma_b^2` of each batch. The sums
    are in float64, even if the buffers of the layer are float16 or bfloat16. During the pass all
    BatchNorm layers are in training mode, so that each sees the activations that the layers before
    it compute from the same batch; all other modules, such as dropout, are in evaluation mode.
    Batches should be shuffled as in training, and not much smaller. InstanceNorm layers that track
    statistics are included, with the mean and the variance of each instance.

    With several processes, call it on every rank of the group with that rank's batches. All ranks
    get the statistics that one process would compute from the batches of all ranks. Ranks may have
    different numbers of batches, or none. `SyncBatchNorm` normalizes each batch without the other
    ranks in this pass. A sharded model, whose ranks communicate in every forward pass, needs the
    same number of batches on all ranks.

    Modes, momenta and the random state are restored. Layers that no batch reaches, and layers
    without running statistics, are not changed.

    References:
        Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, ECCV
        2020, https://arxiv.org/abs/2007.02491 (adaptive batch normalization).

    Args:
        model: Called as `model(inputs)`; its output is ignored. `DistributedDataParallel`,
            `DataParallel` and `torch.compile` are unwrapped.
        loader: Yields batches: a tensor of inputs, a tuple or list with the inputs first, or a
            mapping. The inputs of a mapping are the entry that the model names in
            `main_input_name`, as Transformers' models do, else the first entry that is not called
            label, labels, label_ids, target, targets or index. They are moved to the model's
            device. For a model with several inputs, wrap the model in a module that takes one.
        group: The ranks that take part; `None` means all. To recalibrate on one rank only, pass a
            group of that rank.

    Raises:
        TypeError: If a batch does not have a tensor of inputs first.
        ValueError: If the model has no BatchNorm layer with running statistics, or a lazy one, if
            the loader is empty (on all ranks), a batch has only one value per channel, the
            statistics are not finite in the dtype of the buffers, or this rank is not in `group`.
            The statistics are unchanged then, and also if the loader or the model raises. If one
            rank fails, the others raise a ValueError.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> recalibrate_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
        >>> model.running_mean, model.running_var  # of the means 2 and 6, the variances 2 and 8
        (tensor([4.]), tensor([5.]))
    """
    layers = _layers(model)
    if (ranks := distributed.count(group)) < 1:
        raise ValueError(
            "`group` must contain this rank. Call `recalibrate_bn` only on the ranks of the group."
        )
    if ranks == 1:
        _write(layers, _sums(model, layers, loader))
        return
    sums: dict[str, Sums] = {}
    failure: Exception | None = None
    try:
        sums = _sums(model, layers, loader)
    except Exception as error:  # the other ranks are waiting for this one
        failure = error
    merged = _merged(layers, sums, failure, group)
    _write(layers, merged)


def recalibrate_alone(model: nn.Module, loader: Iterable[Any]) -> None:
    """`recalibrate_bn` on this rank only, regardless of the other ranks."""
    layers = _layers(model)
    _write(layers, _sums(model, layers, loader))


def _layers(model: nn.Module) -> dict[str, _NormBase]:
    layers = with_statistics(model)
    if not layers:
        raise ValueError(
            f"`model` must have BatchNorm layers with running statistics, but "
            f"{type(model).__name__} has none, so there is nothing to recalibrate."
        )
    for path, layer in layers.items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise ValueError(
                f"`model` must be initialized, but `{path}` is a lazy layer that has seen no data. "
                f"Run one batch through the model first."
            )
    return layers


def _sums(
    model: nn.Module, layers: Mapping[str, _NormBase], loader: Iterable[Any]
) -> dict[str, Sums]:
    """The sums of each layer from one pass; the model is restored."""
    # Wrappers would communicate with other ranks, or copy the layers to other devices.
    inner = unwrapped(model)
    with (
        evaluating(model) as device,
        gathered(layers) as sums,
        eagerly(),
        uncached(device),
    ):
        for batch in loader:
            inner(inputs_of(batch, inner).to(device))
    return sums


def _write(layers: Mapping[str, _NormBase], sums: Mapping[str, Sums]) -> None:
    """Set the buffers of the layers that were called."""
    if not sums:
        raise ValueError("`loader` must yield at least one batch, but it is empty.")
    new = {}
    for path, found in sums.items():
        layer: Any = layers[path]
        new[path] = [
            (total / found.values).to(buffer.device, buffer.dtype)
            for total, buffer in (
                (found.mean, layer.running_mean),
                (found.variance, layer.running_var),
            )
        ]
        if not all(bool(value.isfinite().all()) for value in new[path]):
            raise ValueError(
                f"`model` must have activations whose statistics are finite in "
                f"{layer.running_mean.dtype}, but those of `{path or 'the model'}` are NaN or "
                f"infinite. Check the weights for divergence, or use a wider dtype."
            )
    for path, (mean, variance) in new.items():
        layer = layers[path]
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        if layer.num_batches_tracked is not None and isinstance(
            layer, nn.modules.batchnorm._BatchNorm
        ):
            layer.num_batches_tracked.fill_(sums[path].calls)


def _merged(
    layers: Mapping[str, Any],
    mine: Mapping[str, Sums],
    failure: Exception | None,
    group: ProcessGroup | None,
) -> dict[str, Sums]:
    """The sums over all ranks, identical on each rank."""
    device = next(iter(layers.values())).running_mean.device
    rows = {
        path: torch.cat([
            *(found.mean.cpu().double(), found.variance.cpu().double()),
            torch.tensor([found.values, found.calls], dtype=torch.float64, device="cpu"),
        ])
        for path, found in mine.items()
    }
    channels = {path: len(layer.running_mean) for path, layer in layers.items()}
    totals = merged("recalibrate_bn", "BatchNorm", channels, rows, 2, failure, group, device)
    return {
        path: Sums(mean, variance, int(row[-2]), int(row[-1]))
        for path, row in totals.items()
        for mean, variance in [row[:-2].tensor_split(2)]
        if row[-2]
    }
