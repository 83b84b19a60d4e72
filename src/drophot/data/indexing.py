"""A dataset that adds the index to every sample."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from drophot.data.named_tuples import with_index


class IndexedDataset(Dataset[Any]):
    """Wraps a dataset and adds its index to every sample.

    A score belongs to a sample, so the index must stay with the sample through shuffling, batching
    and worker processes. A tuple sample `(x, y)` becomes `(x, y, index)`, a named tuple gains the
    field `index`, a dict or other mapping the key `"index"`, and a bare sample `x` becomes
    `(x, index)`. A sample that is `None`, to be dropped by a `collate_fn`, stays `None`. The
    default collate function turns the indices of a batch into an int64 tensor `index (B,)`.

    The index is the position in the wrapped dataset. `Subset(IndexedDataset(ds), indices)` yields
    positions in `ds`, which a tracker of `len(ds)` samples needs.
    `IndexedDataset(Subset(ds, indices))` yields positions in the subset, from 0 to `K - 1`.

    A list of indices, a slice, or a bool for each sample reads a batch, if the wrapped dataset
    supports it; the index is then a tensor. `__getitems__` of the wrapped dataset is used, unless a
    subclass of this class overrides `__getitem__`.

    Attributes that this class lacks (`targets`, `classes`, …) are read from the wrapped dataset.
    Attributes that the wrapped dataset has (`targets`, `transform`, …) are set there. A subclass of
    this class keeps the attributes that are set on it.

    Args:
        dataset: Any map-style dataset, that is, one with `__len__` and `__getitem__`.

    Raises:
        TypeError: If `dataset` is not map-style, because the samples of a stream have no index.

    Example:
        >>> from torch.utils.data import Subset
        >>> letters = IndexedDataset([("a", 0), ("b", 1), ("c", 0)])
        >>> letters[2]
        ('c', 0, 2)
        >>> Subset(letters, [2, 0])[0]
        ('c', 0, 2)
        >>> IndexedDataset(Subset([("a", 0), ("b", 1), ("c", 0)], [2, 0]))[0]
        ('c', 0, 0)
    """

    def __init__(self, dataset: Any) -> None:
        missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
        if missing:
            found = f"without {' and '.join(f'`{m}`' for m in missing)}"
        elif isinstance(dataset, IterableDataset):  # each has a `__getitem__`, which only raises
            found = "which is iterable-style and has no positions"
        else:
            self.dataset = dataset
            return
        raise TypeError(
            f"`dataset` must be map-style, with `__len__` and `__getitem__`, got "
            f"{type(dataset).__name__} {found}. Pass a map-style dataset, or let the stream yield "
            f"an index with each sample."
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.dataset[index]  # a column, if the dataset has columns
        if isinstance(index, slice):
            return self._batch(index, list(range(*index.indices(len(self.dataset)))))
        if isinstance(index, list | tuple | range) or getattr(index, "ndim", 0) > 0:
            positions = self._positions(index)
            return self._batch(positions, positions)
        index = self._position(index)
        return _with_index(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        # DataLoader prefers this method. Some datasets read a batch faster than its samples
        # (Hugging Face's, torch's Subset); for the others it is a loop.
        if type(self).__getitem__ is not IndexedDataset.__getitem__:
            return [self[index] for index in indices]
        indices = [self._position(index) for index in indices]
        if _reads_in_batches(self.dataset):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = [self.dataset[i] for i in indices]
        return [_with_index(sample, i) for sample, i in zip(samples, indices, strict=True)]

    def __getattr__(self, name: str) -> Any:
        # Unpickling looks up `dataset` before it exists.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = type(self) is not IndexedDataset or name in self.__dict__ or name.startswith("__")
        if not own and name != "dataset" and hasattr(self.dataset, name):
            setattr(self.dataset, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"IndexedDataset({self.dataset!r})"

    def _position(self, index: int) -> int:
        index = operator.index(index)
        size = len(self.dataset)
        if not -size <= index < size:
            raise IndexError(f"`index` must be in [0, {size}), got {index}.")
        return index % size

    def _positions(self, indices: Any) -> list[int]:
        """The positions of a list of indices, or of a bool for each sample."""
        found = indices.tolist() if isinstance(indices, Tensor) else np.asarray(indices).tolist()
        if found and all(isinstance(value, bool) for value in found):
            if len(found) != len(self.dataset):
                raise IndexError(
                    f"`index` must have one bool for each of the {len(self.dataset)} samples, got "
                    f"{len(found)}."
                )
            return [position for position, value in enumerate(found) if value]
        return [self._position(value) for value in found]

    def _batch(self, selection: Any, positions: list[int]) -> Any:
        if isinstance(self.dataset, list | tuple):  # a list has samples, not columns
            return [_with_index(self.dataset[i], i) for i in positions]
        return _with_index(self.dataset[selection], torch.tensor(positions, dtype=torch.int64))


def _reads_in_batches(dataset: Any) -> bool:
    """Whether no subclass overrides `__getitem__` below the class that defines `__getitems__`."""
    if "__getitems__" in getattr(dataset, "__dict__", {}):
        return True
    for kind in type(dataset).__mro__:
        if "__getitems__" in vars(kind):
            return True
        if "__getitem__" in vars(kind):
            return False
    return False


def _with_index(sample: Any, index: Any) -> Any:
    if sample is None:
        return None
    if isinstance(sample, Mapping):
        if "index" in sample:
            return _checked(sample, sample["index"], index)
        if isinstance(sample, MutableMapping) and type(sample) is not dict:
            sample = copy.copy(sample)
            sample["index"] = index
            return sample
        return {**sample, "index": index}
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        if "index" in getattr(sample, "_fields", ()):
            return _checked(sample, sample.index, index)
        return with_index(sample, index)
    if isinstance(sample, tuple | list):
        return (*sample, index)
    return (sample, index)


def _checked(sample: Any, value: Any, index: Any) -> Any:
    """Return a sample that already has the correct index, and refuse one with another index."""
    if not _equal(value, index):
        raise ValueError(
            f'The samples of `dataset` must not have another "index", got {value!r} at position '
            f"{index}. Rename or drop it before you wrap the dataset."
        )
    return sample


def _equal(value: Any, index: Any) -> bool:
    try:
        return bool(np.array_equal(np.asarray(value), np.asarray(index)))
    except (TypeError, ValueError, RuntimeError):
        return False
