"""From a dataset to batches on a device."""

from drophot.data.indexing import IndexedDataset

__all__ = [
    "IndexedDataset",
]
