"""An evaluation pass over a loader that changes neither the model nor the loader."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from drophot._core.model_contexts import evaluating
from drophot.tracking import attach
from drophot.tracking.validation import describe

_PARTS = ("sampler", "batch_sampler", "dataset", "loader", "transform", "transforms")


def observe(
    model: nn.Module, loader: Iterable[Any], present: Callable[[Tensor, Tensor, Tensor], object]
) -> None:
    """Compute the logits of every batch of a loader, and call `present(index, logits, targets)`.

    Raises:
        TypeError: If an argument or a batch has the wrong class.
        ValueError: If the loader is empty.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {describe(model)}. The model is the first "
            f"argument: `observe(model, loader)`."
        )
    stream = isinstance(loader, IterableDataset)
    if isinstance(loader, Dataset | nn.Module) and not stream:
        raise TypeError(
            f"`loader` must yield batches, got {describe(loader)}. Pass "
            f"`DataLoader(dataset, batch_size=...)`."
        )
    attach.check_source(loader)
    batch = None
    with _generators_restored(loader), evaluating(model) as device:
        for batch in _without_persistent_workers(loader):
            if not isinstance(batch, tuple | list) or len(batch) != 3:
                raise TypeError(
                    f"`loader` must yield batches (inputs, targets, index), got {describe(batch)}. "
                    f"Wrap the dataset in IndexedDataset, or call `update` with the logits of your "
                    f"own evaluation pass."
                )
            inputs, targets, index = batch
            if not isinstance(inputs, Tensor):
                raise TypeError(
                    f"The inputs of a batch must be a tensor, got {describe(inputs)}. Return "
                    f"tensors from the dataset or `collate_fn`, or call `update` with the logits "
                    f"of your own evaluation pass."
                )
            present(index, model(inputs.to(device)), targets)
    if batch is None:
        raise ValueError("`loader` must yield at least one batch, but it is empty.")


def _without_persistent_workers(loader: Any) -> Any:
    """The loader, or a copy that does not use the persistent workers of the training."""
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    other = copy.copy(loader)
    # A DataLoader refuses to have these attributes assigned after it is created.
    other.__dict__.update(persistent_workers=False, _iterator=None)
    return other


@contextmanager
def _generators_restored(loader: Any) -> Iterator[None]:
    """Restore the generators of a loader, its samplers and its datasets afterwards."""
    owners, found = [loader], []
    for owner in owners:  # the loop appends to it
        parts = (vars(owner).get(name) for name in _PARTS) if hasattr(owner, "__dict__") else ()
        owners += [part for part in parts if part is not None and len(owners) < 32]
    for owner in owners:
        for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
            if isinstance(value, torch.Generator):
                found.append((value.set_state, value.get_state()))
            elif isinstance(value, random.Random):
                found.append((value.setstate, value.getstate()))
            elif isinstance(value, np.random.RandomState):
                found.append((value.set_state, value.get_state()))
            elif isinstance(value, np.random.Generator):
                found.append((_SetState(value), copy.deepcopy(value.bit_generator.state)))
    try:
        yield
    finally:
        for set_state, state in found:
            set_state(state)


class _SetState:
    """Sets the state of a NumPy generator."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def __call__(self, state: Any) -> None:
        self.generator.bit_generator.state = state
