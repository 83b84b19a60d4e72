"""The smallest fast training loop, and the accuracy it leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from drophot import _random
from drophot._feed import batches, first_sample, in_memory
from drophot._step import fast_forward, fast_step, takes_channels_last
from drophot._untouched import untouched

_CHUNK = 512  # samples judged in one go: their activations stay in a CPU's cache


def fit(
    model: nn.Module,
    dataset: Dataset[Any] | Iterable[Any],
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
        dataset: Samples `(input, target)` or `(input, target, index)`. Or a loader: what is
            iterated once an epoch and has no `__getitem__`, and gives batches `(inputs, targets)`,
            the index third and weights `(B,)` of the samples' losses fourth, if there are any, as
            :class:`drophot.CrestLoader` does. It draws and orders its batches itself.
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
        TypeError: If the samples, or a loader's batches, are no tuples of tensors and numbers.

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
    whole: Any = dataset
    indexed = on_batch is not None
    if hasattr(whole, "__getitem__"):
        epoch_of = _shuffled(model, whole, batch_size, seed, device, indexed=indexed)
    else:
        epoch_of = _loaded(whole, device, indexed=indexed)
    with fast_step(model, optimizer, device) as step:
        for epoch in range(epochs):
            model.train()
            for inputs, targets, *more in epoch_of():
                logits = step(inputs, targets, *more[1:])
                if on_batch is not None:
                    on_batch(more[0], logits, targets)
            if on_epoch is not None:
                on_epoch(epoch)


def _shuffled(
    model: nn.Module,
    dataset: Dataset[Any],
    batch_size: int,
    seed: int,
    device: torch.device,
    *,
    indexed: bool,
) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
    """Gives a dataset's batches, in a fresh order each time."""
    data = in_memory(dataset, device)
    with _random.kept():  # a random transform may draw as often as it likes
        width = len(first_sample("dataset", data))
    if indexed and width != 3:
        raise ValueError(
            f"`dataset` should give (input, target, index) for `on_batch`. Found samples of "
            f"{width}; wrap the dataset in IndexedDataset."
        )
    layout = _layout(model, data, device)
    order = torch.Generator().manual_seed(seed)
    return lambda: batches(data, batch_size, device, shuffle=order, channels_last=layout)


def _loaded(
    loader: Any, device: torch.device, *, indexed: bool
) -> Callable[[], Iterator[tuple[Tensor, ...]]]:
    """Gives a loader's batches, on the device."""

    def epoch() -> Iterator[tuple[Tensor, ...]]:
        for batch in loader:
            if not isinstance(batch, tuple | list) or not 2 + indexed <= len(batch) <= 4:
                size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
                raise TypeError(
                    f"`dataset`, a loader, should give batches (inputs, targets), then an index, "
                    f"which `on_batch` needs, then weights. Found {type(batch).__name__}{size}."
                )
            yield tuple(torch.as_tensor(part).to(device, non_blocking=True) for part in batch)

    return epoch


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

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> evaluate(nn.Identity(), data)  # its inputs are the logits
        0.75
    """
    with untouched(model) as device:
        data = in_memory(dataset, device)
        forward, layout = fast_forward(model, device), _layout(model, data, device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        for inputs, targets, *_ in batches(data, _CHUNK, device, channels_last=layout):
            right += (forward(inputs).argmax(1) == targets).sum()
    return int(right) / len(data)  # type: ignore[arg-type]


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


def _layout(model: nn.Module, data: Dataset[Any], device: torch.device) -> bool:
    """Whether the model is given images with their channels last."""
    with _random.kept():
        sample = torch.as_tensor(first_sample("dataset", data)[0]).to(device)
    return takes_channels_last(model, torch.stack([sample, sample]))
