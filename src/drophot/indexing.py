"""A dataset whose samples know their own index."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


class IndexedDataset(Dataset[Any]):
    """The same dataset, except that every sample carries its own index.

    A score belongs to a sample, so the sample's index has to travel with it through shuffling,
    batching and workers. A tuple sample `(x, y)` becomes `(x, y, index)`, a dict sample gains the
    key `"index"`, and a bare sample `x` becomes `(x, index)`. The default collate function turns
    the indices of a batch into an int64 tensor `index (B,)`.

    The index is the position in the dataset given here. So `Subset(IndexedDataset(ds), indices)`
    yields the positions in `ds`, which is what a tracker of `len(ds)` samples wants, while
    `IndexedDataset(Subset(ds, indices))` yields positions in the subset, from 0 to `K - 1`.

    Attributes that this class lacks (`targets`, `classes`, …) are read from the dataset inside.

    Args:
        dataset: Any map-style dataset, that is, one with `__len__` and `__getitem__`.

    Raises:
        TypeError: If `dataset` is not map-style: the samples of a stream have no index.

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
            raise TypeError(
                f"`dataset` should be map-style, with `__len__` and `__getitem__`. Found "
                f"{type(dataset).__name__} without {' and '.join(f'`{m}`' for m in missing)}; "
                f"give a dataset whose samples can be counted and looked up."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        index = self._position(index)
        return _with_index(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        # The batched read that DataLoader prefers: one call for datasets that gain from it
        # (Hugging Face's, torch's own Subset), the plain loop for the others.
        indices = [self._position(index) for index in indices]
        fetch: Any = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[i] for i in indices]
        return [_with_index(sample, i) for sample, i in zip(samples, indices, strict=True)]

    def __getattr__(self, name: str) -> Any:
        # Not for `dataset` itself, which unpickling asks for before it is there.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __repr__(self) -> str:
        return f"IndexedDataset({self.dataset!r})"

    def _position(self, index: int) -> int:
        index = operator.index(index)
        size = len(self.dataset)
        if not -size <= index < size:
            raise IndexError(f"`index` should be in [0, {size}). Found {index}.")
        return index % size


def _with_index(sample: Any, index: int) -> Any:
    if isinstance(sample, dict):
        if "index" in sample:
            raise ValueError(
                f'A sample should have no key "index" of its own. Found {sample["index"]!r} at '
                f"position {index}; rename or drop that key before wrapping the dataset."
            )
        return {**sample, "index": index}
    if isinstance(sample, tuple | list):
        return (*sample, index)
    return (sample, index)
