"""The smallest fast training loop, and the accuracy it leads to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from drophot import _random
from drophot._untouched import untouched
from drophot.indexing import IndexedDataset

logger = logging.getLogger("drophot")

_CHUNK = 1024  # samples decoded or judged in one go


def fit(
    model: nn.Module,
    dataset: Dataset[Any],
    epochs: int,
    *,
    optimizer: Optimizer,
    batch_size: int = 64,
    seed: int = 0,
    on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    on_epoch: Callable[[int], object] | None = None,
) -> None:
    """Train a classifier with cross-entropy: every sample once an epoch, in a fresh order.

    The data is decoded once and kept on the model's device where that is the same as decoding it
    anew (see `in_memory`). No step waits for the device. The model is left in training mode.

    A user's own loop that takes the same arguments can stand in for this one in
    :class:`drophot.DropHot`; it has to call `on_batch` and `on_epoch` where they are given.

    Args:
        model: Called as `model(inputs)`, gives logits `(B, C)`. Trained where it is.
        dataset: Samples `(input, target)` or `(input, target, index)`.
        epochs: How often to go over the dataset.
        optimizer: Holds the model's parameters.
        batch_size: Samples a step; the last batch of an epoch holds what is left.
        seed: Draws the order of each epoch. Dropout and the like draw from torch's own state.
        on_batch: Called as `on_batch(index, logits, targets)` after each step, with the logits
            that the step was made from: `ForgettingTracker.update` fits. Needs the index.
        on_epoch: Called with the epoch's number, from 0, after each epoch.

    Raises:
        ValueError: If `epochs` is negative, `batch_size` less than 1, the dataset empty, or
            `on_batch` is given and the samples carry no index.
        TypeError: If the samples are no tuples of tensors and numbers.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
        >>> model = nn.Linear(1, 2)
        >>> fit(model, data, 50, optimizer=torch.optim.Adam(model.parameters(), lr=0.1))
        >>> evaluate(model, data)
        1.0
    """
    if epochs < 0:
        raise ValueError(f"`epochs` should not be negative. Found {epochs}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` should be at least 1. Found {batch_size}.")
    device = next(model.parameters()).device
    data = in_memory(dataset, device)
    width = len(first_sample("dataset", data))
    if on_batch is not None and width != 3:
        raise ValueError(
            f"`dataset` should give (input, target, index) for `on_batch`. Found samples of "
            f"{width}; wrap the dataset in IndexedDataset."
        )
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for inputs, targets, *index in batches(data, batch_size, device, shuffle=order):
            logits = model(inputs)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
            if on_batch is not None:
                on_batch(index[0], logits.detach(), targets)
        if on_epoch is not None:
            on_epoch(epoch)


def evaluate(model: nn.Module, dataset: Dataset[Any]) -> float:
    """The share of samples that a classifier gets right.

    The model comes back as it was, mode and random state included.

    Args:
        model: Called as `model(inputs)`, gives logits `(B, C)`.
        dataset: Samples `(input, target)` or `(input, target, index)`.

    Returns:
        The accuracy, in [0, 1].

    Raises:
        ValueError: If the dataset is empty.
        TypeError: If the samples are no tuples of tensors and numbers.
    """
    with untouched(model) as device:
        data = in_memory(dataset, device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        for inputs, targets, *_ in batches(data, _CHUNK, device):
            right += (model(inputs).argmax(1) == targets).sum()
    return int(right) / len(data)  # type: ignore[arg-type]


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    device: torch.device,
    *,
    shuffle: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch of a dataset, batch by batch, on a device.

    Args:
        dataset: What `in_memory` gave, tensors or not.
        batch_size: Samples a batch, at least 1; the last one holds what is left.
        device: Where the batches are wanted.
        shuffle: Draws the order; `None` keeps that of the dataset. The order does not depend on
            whether the dataset is in memory.

    Yields:
        Tuples of tensors, as the samples' tuples, each with a first dimension of `B`.
    """
    size = len(dataset)  # type: ignore[arg-type]
    order = None if shuffle is None else torch.randperm(size, generator=shuffle)
    if isinstance(dataset, TensorDataset):
        if order is None:
            yield from zip(*(t.split(batch_size) for t in dataset.tensors), strict=True)
        else:
            for part in order.to(device).split(batch_size):
                yield tuple(tensor[part] for tensor in dataset.tensors)
        return
    parts = (torch.arange(size) if order is None else order).split(batch_size)
    # The loader draws a number even without workers; not from the order's generator.
    loader = DataLoader(
        dataset, batch_sampler=[part.tolist() for part in parts], generator=torch.Generator()
    )
    for batch in loader:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


class Fit(Protocol):
    """A training loop that can stand in for `fit` in :class:`drophot.DropHot`."""

    def __call__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        epochs: int,
        *,
        optimizer: Optimizer,
        batch_size: int,
        seed: int,
        on_batch: Callable[[Tensor, Tensor, Tensor], object] | None,
        on_epoch: Callable[[int], object] | None,
    ) -> object:
        """Train `model` on `dataset`, and call `on_batch` and `on_epoch`, as `fit` does."""
        ...


def in_memory(dataset: Dataset[Any], device: torch.device | str) -> Dataset[Any]:
    """Decode a dataset once, to tensors on a device, where that changes nothing.

    A dataset whose samples differ from one reading to the next (random augmentation) must not be
    frozen. It shows by drawing random numbers from Python, NumPy or torch, or by giving another
    first sample when read again, and is returned as it is, and so is a dataset that takes more than
    half of the machine's (or the device's free) memory. Random state is left as it was.

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
        tensors = _tensors(dataset) or _decode(dataset, first, torch.device(device))
    if tensors is None:
        return dataset
    return TensorDataset(*(tensor.to(device) for tensor in tensors))


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


def _decode(dataset: Any, first: Any, device: torch.device) -> tuple[Tensor, ...] | None:
    size = len(dataset)
    if size * sum(tensor[0].nbytes for tensor in first) > _memory(device) / 2:
        logger.info("%d samples do not fit in memory: read anew each epoch", size)
        return None
    tensors = tuple(torch.empty((size, *t.shape[1:]), dtype=t.dtype) for t in first)
    fetch = getattr(dataset, "__getitems__", None)
    before = _random.state()
    for start in range(0, size, _CHUNK):
        positions = list(range(start, min(start + _CHUNK, size)))
        samples = fetch(positions) if fetch else [dataset[i] for i in positions]
        for tensor, column in zip(tensors, default_collate(samples), strict=True):
            tensor[start : start + len(positions)] = column
        if _random.state() != before:
            break
    again = default_collate([dataset[0]])
    same = all(torch.equal(a[:1], b) for a, b in zip(tensors, again, strict=True))
    if same and _random.state() == before:
        return tensors
    logger.info("samples differ from one reading to the next: read anew each epoch")
    return None


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
            f"torchvision.transforms.ToTensor()."
        )
    return tuple(sample)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")
