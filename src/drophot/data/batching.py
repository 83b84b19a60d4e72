"""A dataset's batches on a device: from tensors that stay there, or by a loader."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from multiprocessing import current_process
from threading import current_thread, main_thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from drophot._core import random_state, scalars
from drophot.data.cache import in_memory
from drophot.data.determinism import Own
from drophot.data.process_state import can_be_copied, values_of
from drophot.data.samples import as_classes, first_sample, is_plainly, read, targets_of, tensors_of

__all__ = ["at", "batches", "first_sample", "in_memory", "targets_of"]

_PLACES = 16  # samples that are read twice, to see whether they stay the same


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    device: torch.device,
    *,
    shuffle: torch.Generator | Tensor | None = None,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch of a dataset, batch by batch, on a device.

    What is not in memory is read by worker processes (on Linux), as many as torch has threads, if
    it is known that these read the same; else here.
    Random transforms draw by the epoch's order and the batch's number, whoever reads it.

    Args:
        dataset: What `in_memory` gave, tensors or not.
        batch_size: Samples a batch, at least 1; the last one holds what is left.
        device: Where the batches are wanted.
        shuffle: Draws the order, or is the order; `None` keeps that of the dataset. The order does
            not depend on whether the dataset is in memory.
        channels_last: Images come with their channels last in memory. They are contiguous if not.

    Yields:
        Tuples of tensors, as the samples' tuples, each with a first dimension of `B`. Targets of
        any integer type, and truth values, are int64.

    Example:
        >>> data = TensorDataset(torch.arange(3.0), torch.tensor([0, 1, 0]))
        >>> for inputs, targets in batches(data, 2, torch.device("cpu")):
        ...     print(inputs, targets)
        tensor([0., 1.]) tensor([0, 1])
        tensor([2.]) tensor([0])
    """
    batch_size = scalars.integer("batch_size", batch_size, least=1)
    size = len(dataset)  # type: ignore[arg-type]
    seed = _next(shuffle) if isinstance(shuffle, torch.Generator) else 0
    if isinstance(shuffle, torch.Generator):
        order = torch.randperm(size, generator=shuffle)
    else:
        order = torch.arange(size) if shuffle is None else shuffle
    tensors = tensors_of(dataset) if is_plainly(dataset, TensorDataset) else None
    if tensors is not None and tensors[0].device.type == device.type:
        parts = order.to(device).split(batch_size)
        found = (tuple(_gathered(t, part).detach() for t in tensors) for part in parts)
    else:
        found = _loaded(_Batches(dataset, order.split(batch_size), seed), device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for inputs, *rest in found:
        inputs = inputs.to(memory_format=layout) if inputs.dim() == 4 else inputs
        yield (inputs, *map(as_classes, rest[:1]), *rest[1:])


def at(dataset: Dataset[Any], places: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Some samples of a dataset, on a device.

    Args:
        dataset: What `in_memory` gave, tensors or not.
        places: Which, in this order.
        device: Where they are wanted.

    Returns:
        A batch.
    """
    tensors = tensors_of(dataset) if is_plainly(dataset, TensorDataset) else None
    if tensors is not None:
        places = places.to(tensors[0].device)
        inputs, *rest = (_gathered(tensor, places).contiguous().detach() for tensor in tensors)
    else:
        inputs, *rest = (tensor.to(device) for tensor in read(dataset, places.tolist()))
    return (inputs, *map(as_classes, rest[:1]), *rest[1:])


def _gathered(tensor: Tensor, part: Tensor) -> Tensor:
    # Indexing keeps the channels last; index_select does not, and is faster.
    return tensor.index_select(0, part) if tensor.is_contiguous() else tensor[part]


def _next(generator: torch.Generator) -> int:
    """A number that a generator would draw, which it still will."""
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return int(torch.randint(2**31, (), generator=copy))


class _Batches(Dataset[tuple[Tensor, ...]]):
    """An epoch's batches, each with random numbers of its own, the same in any process."""

    def __init__(self, dataset: Dataset[Any], parts: Sequence[Tensor], seed: int) -> None:
        self.dataset, self.parts, self.seed = dataset, parts, seed

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        with random_state.preserved_rng(seed=self.seed + number):
            return read(self.dataset, self.parts[number].tolist())


def _loaded(found: _Batches, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    workers = min(torch.get_num_threads(), len(found) // 8)
    if workers and not _can_fork(found.dataset):
        workers = 0
    loader = DataLoader(
        found,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # it draws a number even without workers
    )
    for batch in loader:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def _can_fork(dataset: Any) -> bool:
    """Whether other processes may read a data set, and read the same."""
    # Elsewhere processes are not forked, and would run the user's script anew; a daemon may have
    # none; and the copy of a process has one of its threads, and what the others locked for good.
    if sys.platform != "linux" or current_process().daemon or current_thread() != main_thread():
        return False
    # Tensors may be on a GPU; and what has a generator of its own would start from the same
    # numbers in each epoch. Copies share the place in an open file, and what they count is lost.
    if tensors_of(dataset) is not None or not can_be_copied(dataset) or Own(dataset).generators:
        return False
    before = values_of(dataset)
    with random_state.preserved_rng():
        near = all(part.device.type == "cpu" for part in read(dataset, [0]))
    return near and _gives_the_same(dataset) and values_of(dataset) == before


def _gives_the_same(dataset: Any) -> bool:
    """Whether some samples are the same when the global generators are."""
    size = len(dataset)
    places = sorted({i * (size - 1) // (_PLACES - 1) for i in range(_PLACES)})

    def once() -> list[tuple[Tensor, ...]]:
        with random_state.preserved_rng(seed=0):
            return [read(dataset, [place]) for place in places]

    return all(
        torch.equal(*pair)
        for a, b in zip(once(), once(), strict=True)
        for pair in zip(a, b, strict=True)
    )
