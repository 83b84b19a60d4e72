"""A pass over a loader that leaves no trace: neither in the model nor in the loader."""

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
    """Show every batch of a loader to a model as it stands.

    Args:
        model: Called as `model(inputs)`.
        loader: Gives batches `(inputs, targets, index)`.
        present: Called with index, logits and targets of each.

    Raises:
        TypeError: If an argument or a batch is of another kind.
        ValueError: If the loader gives no batch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` should be a torch.nn.Module. Found {describe(model)}; the model comes first, "
            f"`observe(model, loader)`."
        )
    stream = isinstance(loader, IterableDataset)
    if isinstance(loader, Dataset | nn.Module) and not stream:
        raise TypeError(
            f"`loader` should give batches. Found {describe(loader)}; wrap it: "
            f"`DataLoader(dataset, batch_size=...)`."
        )
    attach.check_source(loader)
    batch = None
    with _left_alone(loader), evaluating(model) as device:
        for batch in _own_workers(loader):
            if not isinstance(batch, tuple | list) or len(batch) != 3:
                raise TypeError(
                    f"`loader` should give batches (inputs, targets, index). Found "
                    f"{describe(batch)}; wrap the dataset in IndexedDataset, or call `update` "
                    f"with the logits of your own evaluation pass."
                )
            inputs, targets, index = batch
            if not isinstance(inputs, Tensor):
                raise TypeError(
                    f"A batch's inputs should be a tensor. Found {describe(inputs)}; let the data "
                    f"set or `collate_fn` give tensors, or call `update` with the logits of your "
                    f"own evaluation pass."
                )
            present(index, model(inputs.to(device)), targets)
    if batch is None:
        raise ValueError("`loader` must yield at least one batch, but it is empty.")


def _own_workers(loader: Any) -> Any:
    """The loader, or one that leaves the workers alone with which training goes on."""
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    other = copy.copy(loader)
    # Not by assignment, which a DataLoader refuses once it is made.
    other.__dict__.update(persistent_workers=False, _iterator=None)
    return other


@contextmanager
def _left_alone(loader: Any) -> Iterator[None]:
    """Put the generators that a loader, its samplers and data sets have back where they stood."""
    owners, found = [loader], []
    for owner in owners:  # grows on the way
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
                found.append((_Bits(value), copy.deepcopy(value.bit_generator.state)))
    try:
        yield
    finally:
        for put_back, state in found:
            put_back(state)


class _Bits:
    """Sets the state of one of NumPy's generators."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def __call__(self, state: Any) -> None:
        self.generator.bit_generator.state = state
