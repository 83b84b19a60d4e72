"""Read batches from a dataset or from a loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from drophot.data import batching
from drophot.data.samples import as_classes


class BatchLoader(Dataset[tuple[Tensor, ...]]):
    """The batches of step 3 where these are not simply those of a dataset.

    In a mode that chooses samples while the model trains, and with `equal_steps` if the steps do
    not divide into whole epochs of the coreset, :class:`drophot.DropHot` passes a `BatchLoader` to
    your `fit` in place of a dataset. Iterate over it once per epoch. It yields batches `(inputs,
    targets, index)` or `(inputs, targets, index, weights)`, already on the model's device: weight
    each sample's loss by `weights (B,)` where they are given. `batches` accepts it too, so that one
    loop can train in every mode.

    The batches are chosen in the order in which they are read. Reading a sample by its position is
    therefore an error, and so is wrapping a `BatchLoader` in a `DataLoader`.

    Args:
        loader: An iterable of batches. It is iterated again in each epoch.
        num_batches: Batches per epoch, at most as many as `loader` yields. This is the `len()`.

    Example:
        >>> loader = BatchLoader([(torch.zeros(2, 3), torch.tensor([0, 1]))] * 5, num_batches=4)
        >>> len(loader), sum(1 for inputs, targets in loader)
        (4, 4)
    """

    def __init__(self, loader: Iterable[tuple[Tensor, ...]], num_batches: int) -> None:
        self._loader, self._num_batches = loader, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield from islice(self._loader, self._num_batches)

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(
            f"`dataset` is a loader in this step, because the mode selects while the model trains "
            f"or `equal_steps` is set, but `fit` asked for the sample {index!r}. Iterate over "
            f"`drophot.training.batches(dataset, batch_size, device)` once per epoch instead; it "
            f"accepts datasets and loaders."
        )


def is_loader(dataset: Any) -> bool:
    """Whether `dataset` yields batches when iterated, and samples cannot be read by position."""
    if isinstance(dataset, BatchLoader):
        return True
    return not hasattr(dataset, "__getitem__") and hasattr(dataset, "__iter__")


def batches(
    dataset: Dataset[Any] | Iterable[Any],
    batch_size: int,
    device: torch.device,
    *,
    shuffle: torch.Generator | Tensor | None = None,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield one epoch of a dataset or a loader in batches on a device.

    A dataset of tensors on the device is gathered there. Other datasets are read by worker
    processes where these are known to read the same samples (Linux only), as many as torch has
    threads, and otherwise in this process. Random transforms draw from the epoch's order and the
    batch's number, so the number of workers does not change the samples.

    A loader draws and orders its batches itself: `batch_size`, `shuffle` and `channels_last` do not
    apply to it.

    Args:
        dataset: Samples `(input, target)` or `(input, target, index)`. Or a loader, which has no
            `__getitem__` or is a `BatchLoader`, and yields batches `(inputs, targets)`, optionally
            with an index `(B,)` and weights `(B,)` of the samples' losses.
        batch_size: Samples per batch, at least 1. The last batch holds the remaining samples.
        device: The device of the batches.
        shuffle: A generator that draws the order, or the order itself. `None` keeps the dataset's
            order. The order does not depend on whether the dataset is in memory.
        channels_last: Whether images have their channels last in memory.

    Yields:
        Tuples of tensors with first dimension `B`, one tensor for each part of a sample. Targets of
        any integer or boolean type are converted to int64.

    Raises:
        ValueError: If `batch_size` is less than 1, the samples differ in shape, a loader yields no
            batch, or its weights are not finite floats of shape `(B,)`.
        TypeError: If an argument is of the wrong kind, or a loader's batches are not tuples of 2 to
            4 tensors.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(5, 3), torch.arange(5))
        >>> order = torch.Generator().manual_seed(0)
        >>> cpu = torch.device("cpu")
        >>> [len(targets) for inputs, targets in batches(data, 2, cpu, shuffle=order)]
        [2, 2, 1]
    """
    if is_loader(dataset):
        return loader_batches(dataset, device)
    whole: Any = dataset
    return batching.batches(whole, batch_size, device, shuffle=shuffle, channels_last=channels_last)


def loader_batches(
    loader: Any, device: torch.device, *, indexed: bool = False, epoch: int | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield one epoch of a loader on a device, and refuse batches that cannot be trained on."""
    empty = True
    finite: list[Tensor] = []  # on a GPU: reading these in each step would wait for the device
    for batch in loader:
        empty = False
        if not isinstance(batch, tuple | list) or not 2 + indexed <= len(batch) <= 4:
            size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            needed = ", with the index that `on_batch` needs" if indexed else ""
            raise TypeError(
                "`dataset`, a loader, must yield batches (inputs, targets), (inputs, targets, "
                f"index) or (inputs, targets, index, weights){needed}, but it yielded a "
                f"{type(batch).__name__}{size}."
            )
        parts = [torch.as_tensor(part) for part in batch]
        _check_index_and_weights(parts)
        if len(parts) == 4:
            all_finite = parts[3].isfinite().all()
            if all_finite.is_cpu:
                _check_finite(all_finite)
            else:
                finite.append(all_finite)
        inputs, targets, *more = (part.to(device, non_blocking=True) for part in parts)
        yield (inputs, as_classes(targets), *more)
    if finite:
        _check_finite(torch.stack(finite).all())
    if empty:
        when = "each epoch" if epoch is None else f"each epoch, but yielded none in epoch {epoch}"
        raise ValueError(
            f"`dataset`, a loader, must yield at least one batch in {when}. Is its batch size "
            f"larger than the data with drop_last=True, or does it return the same iterator each "
            f"time?"
        )


def check_rereadable(loader: Any, epochs: int) -> None:
    """Refuse an iterator for more than one epoch: it is exhausted after the first."""
    if epochs > 1 and hasattr(loader, "__next__"):
        raise TypeError(
            f"`dataset` must be a dataset or a loader that can be iterated again in each of the "
            f"{epochs} epochs, got an iterator ({type(loader).__name__}). Pass the object that it "
            f"was made from, such as the DataLoader."
        )


def _check_index_and_weights(parts: list[Tensor]) -> None:
    """Refuse a loader's index or weights of the wrong dtype or shape."""
    size = parts[0].shape[:1]
    if len(parts) > 2 and (parts[2].is_floating_point() or parts[2].is_complex()):
        raise ValueError(
            f"`dataset`, a loader, must yield an integer index third and weights fourth, but its "
            f"third tensor is {parts[2].dtype}. Yield (inputs, targets, index, weights)."
        )
    if len(parts) == 4 and (not parts[3].is_floating_point() or parts[3].shape != size):
        raise ValueError(
            f"`dataset`, a loader, must yield weights as floats of shape {tuple(size)}, one per "
            f"sample, but they are {parts[3].dtype} of shape {tuple(parts[3].shape)}. Use "
            f"squeeze(1) for a column and float() for integers."
        )


def _check_finite(all_finite: Tensor) -> None:
    if not bool(all_finite):
        raise ValueError(
            "`dataset`, a loader, must yield finite weights, but some are NaN or infinity. "
            "Training with them would make every parameter of the model NaN."
        )
