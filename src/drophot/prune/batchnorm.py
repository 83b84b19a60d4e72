"""Recompute the running statistics of BatchNorm layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from drophot._core import distributed
from drophot._core.model_contexts import evaluating
from drophot.prune.eager_mode import eagerly, uncached
from drophot.prune.running_statistics import Sums, gathered, with_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Keys of a batch that are not inputs of the model.
_NOT_INPUTS = frozenset(["labels", "label", "label_ids", "targets", "target", "index"])


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
    inner = _unwrapped(model)
    with (
        evaluating(model) as device,
        gathered(layers) as sums,
        eagerly(),
        uncached(device),
    ):
        for batch in loader:
            inner(_inputs(batch, inner).to(device))
    return sums


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original  # torch.compile: this pass is eager
        else:
            return model


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
    widths = [len(layer.running_mean) for layer in layers.values()]
    device = next(iter(layers.values())).running_mean.device
    shape = [len(widths), sum(widths), sum(i * width for i, width in enumerate(widths, 1))]
    table = distributed.gather_numbers([failure is not None, *shape], group, device)
    if failure is not None:
        raise failure
    if failed := table[:, 0].nonzero()[:, 0].tolist():
        raise ValueError(
            f"`recalibrate_bn` failed on ranks {failed} (see the error raised there). Nothing was "
            f"merged."
        )
    if len(table.unique(dim=0)) > 1:
        raise ValueError(
            f"`model` must have the same BatchNorm layers on every rank, got "
            f"{table[:, 1:3].tolist()} as [layers, channels] of each rank."
        )
    rows = []
    for path, width in zip(layers, widths, strict=True):
        own = mine.get(path)
        row = torch.zeros(2 * width + 2, dtype=torch.float64, device="cpu")
        if own is not None:
            row[:width], row[width : 2 * width] = own.mean.cpu(), own.variance.cpu()
            row[2 * width], row[2 * width + 1] = own.values, own.calls
        rows.append(row)
    packed = torch.cat(rows)[None]
    total = torch.zeros_like(packed[0])
    cpu = packed.device
    for columns in distributed.gather_tables({"sums": packed}, [1] * len(table), group, cpu):
        total += columns["sums"][0]  # in the order of the ranks, so that all get equal bits
    found: dict[str, Sums] = {}
    for (path, width), row in zip(
        zip(layers, widths, strict=True), total.split([2 * w + 2 for w in widths]), strict=True
    ):
        values, calls = int(row[-2]), int(row[-1])
        if values:
            found[path] = Sums(row[:width], row[width : 2 * width], values, calls)
    return found


def _inputs(batch: Any, model: nn.Module) -> Tensor:
    first = batch
    if isinstance(batch, Mapping):
        named = getattr(model, "main_input_name", None)
        if isinstance(named, str) and named in batch:
            first = batch[named]
        else:
            first = next((v for name, v in batch.items() if name not in _NOT_INPUTS), None)
    elif isinstance(batch, tuple | list):
        first = batch[0] if batch else None
    if not isinstance(first, Tensor):
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"`loader` must yield batches with a tensor of inputs first, got "
            f"{type(first).__name__} in a batch of type {type(batch).__name__}{keys}. Wrap the "
            f"loader in a generator that yields the inputs."
        )
    return first
