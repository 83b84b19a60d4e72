"""A dataset's batches on a device: from tensors that stay there, or by a loader."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import current_process
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from drophot import _memory, _random
from drophot.indexing import IndexedDataset

logger = logging.getLogger("drophot")

_CHUNK = 1024  # samples decoded in one go
_PLACES = 16  # samples that are read twice, to see whether they stay the same


def in_memory(dataset: Dataset[Any], device: torch.device | str) -> Dataset[Any]:
    """Decode a dataset once, to tensors on a device, where that changes nothing.

    A dataset whose samples differ from one reading to the next (random augmentation) must not be
    frozen. It shows by drawing random numbers from Python, NumPy or torch, or by giving other
    samples when some are read again, and is returned as it is, and so is a dataset that takes more
    than half of the device's free memory. Random state is left as it was.

    Images have their channels last in memory, as convolutions like them; shapes are as before.

    Args:
        dataset: Samples `(input, target)` or `(input, target, index)`, inputs of one shape.
        device: Where the tensors are wanted.

    Returns:
        A `TensorDataset`, or `dataset` itself.

    Raises:
        ValueError: If the dataset is empty or has no length.
        TypeError: If the samples are no tuples of tensors and numbers.

    Example:
        >>> data = in_memory([(torch.zeros(2), 0), (torch.ones(2), 1)], "cpu")
        >>> data.tensors
        (tensor([[0., 0.],
                [1., 1.]]), tensor([0, 1]))
    """
    with _random.kept():
        first = default_collate([first_sample("dataset", dataset)])
        size = len(dataset) * sum(tensor[0].nbytes for tensor in first)  # type: ignore[arg-type]
        tensors = _tensors(dataset)
        there = tensors is not None and tensors[0].device.type == torch.device(device).type
        if not there and size > _memory.available(device) / 2:
            logger.warning(
                "%d samples of together %.1f GB do not fit in memory (%s): read anew each "
                "epoch, which is slower",
                len(dataset),  # type: ignore[arg-type]
                size / 1e9,
                device,
            )
            return dataset
        tensors = tensors or _decode(dataset, first)
    if tensors is None:
        return dataset
    inputs, *rest = (tensor.to(device) for tensor in tensors)
    if inputs.dim() == 4 and inputs.nbytes <= _memory.available(device) / 2:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return TensorDataset(inputs, *rest)


def _tensors(dataset: Any) -> tuple[Tensor, ...] | None:
    """The tensors of a dataset that is made of tensors already."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    if isinstance(dataset, IndexedDataset):
        inner = _tensors(dataset.dataset)
        return inner and (*inner, torch.arange(len(inner[0]), device=inner[0].device))
    if isinstance(dataset, Subset):
        inner = _tensors(dataset.dataset)
        return inner and tuple(t[torch.as_tensor(dataset.indices, device=t.device)] for t in inner)
    return None


def _decode(dataset: Any, first: Any) -> tuple[Tensor, ...] | None:
    size = len(dataset)
    if _reads(dataset) == "the same":
        tensors = tuple(torch.empty((size, *t.shape[1:]), dtype=t.dtype) for t in first)
        before = _random.state()
        for start in range(0, size, _CHUNK):
            positions = range(start, min(start + _CHUNK, size))
            for tensor, column in zip(tensors, _read(dataset, positions), strict=True):
                tensor[start : start + len(positions)] = column
            if _random.state() != before:
                break
        else:
            return tensors
    logger.info("samples differ from one reading to the next: read anew each epoch")
    return None


def _read(dataset: Any, positions: Sequence[int]) -> tuple[Tensor, ...]:
    """A batch."""
    if isinstance(dataset, TensorDataset):
        return tuple(tensor[list(positions)] for tensor in dataset.tensors)
    fetch = getattr(dataset, "__getitems__", None)
    samples = fetch(list(positions)) if fetch else [dataset[i] for i in positions]
    return tuple(default_collate(samples))


def _reads(dataset: Any) -> Literal["the same", "random", "its own"]:
    """What reading a sample twice gives: the same, what global generators draw, or what its own."""
    size = len(dataset)
    places = sorted({i * (size - 1) // (_PLACES - 1) for i in range(_PLACES)})

    def read() -> tuple[list[tuple[Tensor, ...]], bool]:
        with _random.kept(seed=0):
            before = _random.state()
            samples = [_read(dataset, [place]) for place in places]
            return samples, _random.state() != before

    once, drawn = read()
    again, _ = read()
    same = all(
        torch.equal(*pair)
        for a, b in zip(once, again, strict=True)
        for pair in zip(a, b, strict=True)
    )
    return "its own" if not same else "random" if drawn else "the same"


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    device: torch.device,
    *,
    shuffle: torch.Generator | Tensor | None = None,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch of a dataset, batch by batch, on a device.

    What is not in memory is read by worker processes (on Linux), as many as torch has threads.
    Random transforms draw by the epoch's order and the batch's number, whoever reads it.

    Args:
        dataset: What `in_memory` gave, tensors or not.
        batch_size: Samples a batch, at least 1; the last one holds what is left.
        device: Where the batches are wanted.
        shuffle: Draws the order, or is the order; `None` keeps that of the dataset. The order does
            not depend on whether the dataset is in memory.
        channels_last: Images come with their channels last in memory. They are contiguous if not.

    Yields:
        Tuples of tensors, as the samples' tuples, each with a first dimension of `B`.
    """
    size = len(dataset)  # type: ignore[arg-type]
    seed = _next(shuffle) if isinstance(shuffle, torch.Generator) else 0
    if isinstance(shuffle, torch.Generator):
        order = torch.randperm(size, generator=shuffle)
    else:
        order = torch.arange(size) if shuffle is None else shuffle
    if isinstance(dataset, TensorDataset) and dataset.tensors[0].device.type == device.type:
        parts = order.to(device).split(batch_size)
        found = (tuple(_gathered(t, part) for t in dataset.tensors) for part in parts)
    else:
        found = _loaded(_Batches(dataset, order.split(batch_size), seed), device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for inputs, *rest in found:
        yield (inputs.to(memory_format=layout) if inputs.dim() == 4 else inputs, *rest)


def at(dataset: Dataset[Any], places: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Some samples of a dataset, on a device.

    Args:
        dataset: What `in_memory` gave, tensors or not.
        places: Which, in this order.
        device: Where they are wanted.

    Returns:
        A batch.
    """
    if isinstance(dataset, TensorDataset):
        places = places.to(dataset.tensors[0].device)
        return tuple(_gathered(tensor, places).contiguous() for tensor in dataset.tensors)
    return tuple(tensor.to(device) for tensor in _read(dataset, places.tolist()))


def targets_of(dataset: Any) -> Tensor:
    """The targets of all samples, without reading the samples where somebody knows them.

    Args:
        dataset: What `in_memory` gave, or any other map-style dataset.

    Returns:
        Integers, shape `(N,)`, on the CPU.
    """
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].cpu()
    if isinstance(dataset, Subset):
        return targets_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, IndexedDataset):
        return targets_of(dataset.dataset)
    total = len(dataset)
    known = getattr(dataset, "targets", None)
    with _random.kept():
        if known is not None and len(known) == total:
            # A transform may give others than those that stand there.
            some = {0, total // 2, total - 1}
            if all(bool((torch.as_tensor(dataset[p][1]) == known[p]).all()) for p in some):
                return torch.as_tensor(known).cpu()
        return torch.stack([torch.as_tensor(dataset[place][1]) for place in range(total)]).cpu()


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
        with _random.kept(seed=self.seed + number):
            return _read(self.dataset, self.parts[number].tolist())


def _loaded(found: _Batches, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    workers = min(torch.get_num_threads(), len(found) // 8)
    # Elsewhere processes are not forked, and would run the user's script anew; a daemon may have
    # none; tensors may be on a GPU; and what has a generator of its own would start from the same
    # numbers in each epoch.
    one = sys.platform != "linux" or current_process().daemon or _tensors(found.dataset) is not None
    if one or _reads(found.dataset) == "its own":
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


def first_sample(name: str, dataset: Any) -> tuple[Any, ...]:
    """A data set's first sample, as far as this module can train on it.

    Args:
        name: What the caller calls the data set.
        dataset: The data set.

    Returns:
        The sample, `(input, target)` or `(input, target, index)`.

    Raises:
        ValueError: If the data set is empty.
        TypeError: If it has no length, or the sample is no such tuple.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`{name}` should be map-style, with `__len__` and `__getitem__`. Found "
            f"{type(dataset).__name__} without a length."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` should have at least one sample. Found none.")
    sample = dataset[0]
    if (
        not isinstance(sample, tuple | list)
        or len(sample) not in (2, 3)
        or not isinstance(sample[0], Tensor | np.ndarray)
        or not all(isinstance(part, Tensor | np.ndarray | np.number | int) for part in sample[1:])
    ):
        kinds = (
            f"({', '.join(type(part).__name__ for part in sample)})"
            if isinstance(sample, tuple | list)
            else type(sample).__name__
        )
        raise TypeError(
            f"`{name}` should give samples (input, target) or (input, target, index) with a tensor "
            f"as input. Found {kinds}; images become tensors by a transform such as "
            f"torchvision.transforms.ToTensor(), and dicts are for a loop of your own."
        )
    return tuple(sample)
