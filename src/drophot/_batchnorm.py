"""BatchNorm's running statistics, anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from drophot import _ranks
from drophot._eager import eagerly, uncached
from drophot._statistics import Sums, gathered, with_statistics
from drophot._untouched import untouched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What a batch with names calls something else than the model's inputs.
_NOT_INPUTS = frozenset(["labels", "label", "label_ids", "targets", "target", "index"])


def recalibrate_bn(
    model: nn.Module, loader: Iterable[Any], *, group: ProcessGroup | None = None
) -> None:
    r"""Set the running statistics of all BatchNorm layers anew from a loader's batches.

    Pruned weights give other activations than those that the running statistics were gathered
    from. One pass puts that right; no weight is touched. The statistics start anew, and each layer
    weighs a batch by its number :math:`n_b` of values a channel, so that a smaller last batch
    counts for what it holds:

    .. math::
        \mu = \sum_b \frac{n_b}{n} \mu_b \qquad \sigma^2 = \sum_b \frac{n_b}{n} \sigma_b^2

    with the mean :math:`\mu_b` and the unbiased variance :math:`\sigma_b^2` of each batch. They are
    summed in float64, also where the layer's own buffers are of float16 or bfloat16. In the
    pass all BatchNorm layers are in training mode at once, so that each sees what those before it
    make of the same batch; everything else, dropout for one, is in evaluation mode. Batches should
    be as in training: shuffled, and not much smaller. InstanceNorm layers that track statistics
    are treated alike, with the mean and the variance of each instance.

    With several processes, every rank of the group calls it with its own batches, and all get the
    statistics of all batches, as one process would that saw every rank's. Ranks may have different
    numbers of batches, or none. `SyncBatchNorm` normalises each batch without the other ranks in
    this pass. A model that is sharded, whose ranks communicate in every forward pass, needs equally
    many batches on all ranks.

    Modes, momenta and the random state are put back. A layer that no batch reaches, and layers
    without running statistics, keep what they have.

    References:
        Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, ECCV
        2020, https://arxiv.org/abs/2007.02491 (adaptive batch normalization).

    Args:
        model: Called as `model(inputs)`; what it gives is not looked at.
            `DistributedDataParallel` and `DataParallel` are unwrapped.
        loader: Gives batches: the inputs, or a tuple or list with the inputs first, or a mapping.
            Of a mapping the inputs are what the model names in `main_input_name`, as those of
            Transformers do, else the first entry that is not called label, labels, label_ids,
            target, targets or index. They are moved to the model's device.
        group: The ranks that take part; `None` means all. To recalibrate on one rank only, give a
            group of that rank.

    Raises:
        TypeError: If a batch has no tensor of inputs first.
        ValueError: If the model has no BatchNorm layer with running statistics, or one that has
            seen no data yet, the loader is empty (on all ranks), a batch has one value a channel
            only, the statistics are not finite or beyond the range of the buffers' dtype, or this
            rank is not in `group`. The statistics are then what they were, and so they are if the
            loader or the model raises. On the other ranks that is a ValueError too.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> recalibrate_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
        >>> model.running_mean, model.running_var  # of the means 2 and 6, the variances 2 and 8
        (tensor([4.]), tensor([5.]))
    """
    layers = _layers(model)
    if (ranks := _ranks.count(group)) < 1:
        raise ValueError(
            "`group` should contain this rank. Found one that does not; call `recalibrate_bn` on "
            "the ranks of the group only."
        )
    if ranks == 1:
        _write(layers, _sums(model, layers, loader))
        return
    sums: dict[str, Sums] = {}
    failure: Exception | None = None
    try:
        sums = _sums(model, layers, loader)
    except Exception as error:  # the others are waiting, and have to hear of it
        failure = error
    merged = _merged(layers, sums, failure, group)
    _write(layers, merged)


def recalibrate_alone(model: nn.Module, loader: Iterable[Any]) -> None:
    """The same in one process, whatever other ranks do.

    Args:
        model: The model.
        loader: Gives batches.
    """
    layers = _layers(model)
    _write(layers, _sums(model, layers, loader))


def _layers(model: nn.Module) -> dict[str, _NormBase]:
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
    return layers


def _sums(
    model: nn.Module, layers: Mapping[str, _NormBase], loader: Iterable[Any]
) -> dict[str, Sums]:
    """What each layer is given in one pass; the model is as it was."""
    # These would talk to other ranks, or copy the layers to other devices.
    inner = _unwrapped(model)
    with (
        untouched(model) as device,
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
            model = original  # compiled, which this pass is not
        else:
            return model


def _write(layers: Mapping[str, _NormBase], sums: Mapping[str, Sums]) -> None:
    """Set the buffers of the layers that were called."""
    if not sums:
        raise ValueError("`loader` should give at least one batch. Found none.")
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
                f"`model` should give activations whose statistics are finite in "
                f"{layer.running_mean.dtype}. Found NaN or infinity at `{path or 'the model'}`; "
                f"look for weights that diverged, or use a wider dtype."
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
    """The sums of all ranks, the same on each."""
    widths = [len(layer.running_mean) for layer in layers.values()]
    device = next(iter(layers.values())).running_mean.device
    shape = [len(widths), sum(widths), sum(i * width for i, width in enumerate(widths, 1))]
    table = _ranks.numbers([failure is not None, *shape], group, device)
    if failure is not None:
        raise failure
    if failed := table[:, 0].nonzero()[:, 0].tolist():
        raise ValueError(
            f"`recalibrate_bn` should succeed on every rank. Ranks {failed} failed (see the error "
            f"raised there). Nothing was merged."
        )
    if len(table.unique(dim=0)) > 1:
        raise ValueError(
            f"`model` should have the same BatchNorm layers on every rank. Found, for layers and "
            f"channels, {table[:, 1:3].tolist()}."
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
    for columns in _ranks.tables({"sums": packed}, [1] * len(table), group, cpu):
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
            f"`loader` should give batches with a tensor of inputs first. Found "
            f"{type(first).__name__} in a {type(batch).__name__}{keys}; wrap the loader in one "
            f"that does."
        )
    return first
