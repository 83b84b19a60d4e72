"""The batches of a dataset on a device, gathered from tensors or read sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from drophot._core import scalars
from drophot.data.cache import in_memory
from drophot.data.samples import as_classes, first_sample, is_plainly, read, targets_of, tensors_of
from drophot.data.workers import Workers

__all__ = ["at", "batches", "first_sample", "in_memory", "targets_of"]


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    device: torch.device,
    *,
    shuffle: torch.Generator | Tensor | None = None,
    channels_last: bool = False,
    workers: Workers | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch of a dataset, batch by batch, on a device.

    A dataset that is not in memory is read by worker processes (on Linux), at most as many as torch
    has threads, if they are known to read the same samples; otherwise by this process. The random
    numbers of a transform depend on the order of the epoch and the number of the batch, not on the
    process.

    Args:
        dataset: The result of `in_memory`, tensors or not.
        batch_size: Samples per batch, at least 1. The last batch has the remaining samples.
        device: The device of the batches.
        shuffle: A generator that draws the order, or the order; `None` keeps the order of the
            dataset. The order does not depend on whether the dataset is in memory.
        channels_last: Whether images have their channels last in memory; otherwise they are
            contiguous.
        workers: Worker processes to use in several epochs. `None` starts new ones if necessary.

    Yields:
        Tuples of tensors, like the samples' tuples, each with a first dimension of `B`. Targets of
        any integer type or bool are int64.

    Example:
        >>> data = TensorDataset(torch.arange(3.0), torch.tensor([0, 1, 0]))
        >>> for inputs, targets in batches(data, 2, torch.device("cpu")):
        ...     print(inputs, targets)
        tensor([0., 1.]) tensor([0, 1])
        tensor([2.]) tensor([0])
    """
    batch_size = scalars.integer("batch_size", batch_size, least=1)
    size = len(dataset)  # type: ignore[arg-type]
    seed = _peek(shuffle) if isinstance(shuffle, torch.Generator) else 0
    if isinstance(shuffle, torch.Generator):
        order = torch.randperm(size, generator=shuffle)
    else:
        order = torch.arange(size) if shuffle is None else shuffle
    tensors = tensors_of(dataset) if is_plainly(dataset, TensorDataset) else None
    if tensors is not None and tensors[0].device.type == device.type:
        parts = order.to(device).split(batch_size)
        found = (tuple(_rows(t, part).detach() for t in tensors) for part in parts)
    else:
        parts, pin_memory = order.split(batch_size), device.type == "cuda"
        read_batches = (workers or Workers()).read(dataset, parts, seed, pin_memory=pin_memory)
        found = (tuple(t.to(device, non_blocking=True) for t in batch) for batch in read_batches)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for inputs, *rest in found:
        inputs = inputs.to(memory_format=layout) if inputs.dim() == 4 else inputs
        yield (inputs, *map(as_classes, rest[:1]), *rest[1:])


def num_batches(num_samples: int, batch_size: int) -> int:
    """The number of batches in an epoch, the last one included if it is smaller."""
    return -(-num_samples // batch_size)


def at(dataset: Dataset[Any], positions: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """The samples at some positions of a dataset as a batch on a device."""
    tensors = tensors_of(dataset) if is_plainly(dataset, TensorDataset) else None
    if tensors is not None:
        positions = positions.to(tensors[0].device)
        inputs, *rest = (_rows(tensor, positions).contiguous().detach() for tensor in tensors)
    else:
        inputs, *rest = (tensor.to(device) for tensor in read(dataset, positions.tolist()))
    return (inputs, *map(as_classes, rest[:1]), *rest[1:])


def _rows(tensor: Tensor, positions: Tensor) -> Tensor:
    # Indexing keeps channels last. `index_select` does not, but is faster.
    if tensor.is_contiguous():
        return tensor.index_select(0, positions)
    return tensor[positions]


def _peek(generator: torch.Generator) -> int:
    """The number that a generator would draw next, without drawing it."""
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return int(torch.randint(2**31, (), generator=copy))
