"""The data of a grid's workers: written to the store once, and read there by each process."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from drophot.data.samples import is_plainly
from drophot.grid.store import write_file
from drophot.pipeline.config import RunConfig

_FILE = "data.pt"


@dataclass(frozen=True, slots=True)
class StoredDataset(Dataset[object]):
    """Takes the place of a dataset of tensors on its way to a worker."""

    path: Path
    name: str
    digest: str
    """The digest of the data."""


def tensors_of(config: RunConfig) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of the datasets of a run that are nothing but tensors."""
    datasets = {"train_set": config.train_set, "test_set": config.test_set}
    return {
        name: data.tensors for name, data in datasets.items() if is_plainly(data, TensorDataset)
    }


def store_data(config: RunConfig, folder: Path, digest: str) -> RunConfig:
    """Write the tensors of a run's datasets to a folder.

    Args:
        config: The run.
        folder: The folder of a store.
        digest: The digest of the data.

    Returns:
        The run without these tensors, which is light enough to be sent to workers.
    """
    tensors = tensors_of(config)
    content = io.BytesIO()
    torch.save({name: [part.cpu() for part in parts] for name, parts in tensors.items()}, content)
    path = folder / _FILE
    write_file(path, content.getvalue())
    return _with_datasets(config, {name: StoredDataset(path, name, digest) for name in tensors})


def load_data(config: RunConfig) -> RunConfig:
    """The run with the tensors that `store_data` took from it, on its device."""
    datasets = {"train_set": config.train_set, "test_set": config.test_set}
    loaded = {
        name: _read(data.path, data.digest, config.device)[data.name]
        for name, data in datasets.items()
        if isinstance(data, StoredDataset)
    }
    return _with_datasets(config, loaded)


@lru_cache(maxsize=1)  # for the next stage of this process; the digest tells other data apart
def _read(path: Path, digest: str, device: torch.device) -> dict[str, TensorDataset]:
    """The datasets of a file; the processes of a machine share the memory of a CPU's."""
    content = cast("dict[str, list[Tensor]]", torch.load(path, mmap=True, weights_only=True))
    return {
        name: TensorDataset(*(tensor.to(device) for tensor in tensors))
        for name, tensors in content.items()
    }


def _with_datasets(config: RunConfig, datasets: Mapping[str, Dataset[object]]) -> RunConfig:
    return replace(
        config,
        train_set=datasets.get("train_set", config.train_set),
        test_set=datasets.get("test_set", config.test_set),
    )
