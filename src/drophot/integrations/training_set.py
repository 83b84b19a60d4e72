"""Checks that the indices of a training set are those of a tracker's samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Subset

from drophot.data.indexing import IndexedDataset
from drophot.tracking import attach


def check_training_set(dataset: Any, num_samples: int) -> None:
    """Refuse a training set whose samples a tracker of `num_samples` samples cannot count.

    Raises:
        ValueError: If it has too many samples, joins several IndexedDatasets, or its column `index`
            has other numbers than those of the tracker's samples.
    """
    attach.check_source(Subset(dataset, []))
    size = len(dataset) if hasattr(dataset, "__len__") else None
    if isinstance(dataset, Subset) and isinstance(dataset.dataset, IndexedDataset):
        size = max(dataset.indices, default=-1) + 1  # the indices are those of the whole dataset
    if size is not None and size > num_samples:
        raise ValueError(
            f"`tracker` must have the {size} samples of the training set, got one of {num_samples} "
            f"samples. Create it with `num_samples=len(dataset)`, where IndexedDataset wraps "
            f"`dataset`."
        )
    _check_column(dataset, num_samples)


def _check_column(dataset: Any, num_samples: int) -> None:
    """Check the column `index` of a `datasets.Dataset`, if it has one."""
    columns = getattr(dataset, "column_names", None) or ()
    if "index" not in columns or not hasattr(dataset, "__len__"):
        return
    index = np.asarray(dataset.with_format("numpy")["index"][:])
    if not np.issubdtype(index.dtype, np.integer) or index.ndim != 1:
        raise ValueError(f"The column `index` must contain integers, got {index.dtype}.")
    if len(index) and not (index.min() >= 0 and index.max() < num_samples):
        wrong = index.min() if index.min() < 0 else index.max()
        raise ValueError(
            f"The column `index` must be in [0, {num_samples}), the samples of the tracker, got "
            f"{wrong}. Create the tracker with the length of the dataset that was numbered."
        )
    values, counts = np.unique(index, return_counts=True)
    if len(values) < len(index):
        raise ValueError(
            f"The column `index` must have each number once, got {values[counts.argmax()]} "
            f"{counts.max()} times. Drop the column and wrap the dataset in IndexedDataset."
        )
