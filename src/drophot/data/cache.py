"""Datasets that are decoded once and kept in memory, if that does not change their samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from drophot._core import memory, random_state
from drophot.data.determinism import OwnRandomness, is_pure
from drophot.data.indexing import IndexedDataset
from drophot.data.process_state import holds_its_samples, values_of
from drophot.data.samples import (
    as_classes,
    first_sample,
    is_plainly,
    known_targets,
    read,
    stacked,
    tensors_of,
)
from drophot.data.workers import Workers

logger = logging.getLogger("drophot")

Cache = bool | Literal["auto"]

_CHUNK_SIZE = 1024  # samples decoded at a time
_NUM_REREAD = 16  # samples that are read again before each epoch
_warned: WeakSet[Any] = WeakSet()


def check_cache(cache: Any) -> None:
    if not (isinstance(cache, bool) or (isinstance(cache, str) and cache == "auto")):
        raise TypeError(f'`cache` must be True, False or "auto", got {cache!r}.')


def in_memory(
    dataset: Dataset[Any], device: torch.device | str, *, cache: Cache = "auto"
) -> Dataset[Any]:
    """Decode a dataset once into tensors on a device, if that does not change its samples.

    A dataset whose samples change between readings (random augmentation, a curriculum) must not be
    cached. With `cache="auto"` the decoded samples are kept if

    - the dataset is known to give the same samples each time: tensors, a list, or a dataset of
      torchvision with deterministic transforms; or
    - it has no `set_epoch`, two readings of all samples, one forwards and one backwards, are
      equal, and reading advances no random generator: neither those of Python, NumPy and torch, nor
      any that the dataset, its transforms or their code hold.

    This misses changes that are rarer than once per reading of the dataset and draw from an unknown
    source of random numbers. Pass `cache=False` for such a dataset. If the dataset is not made of
    tensors, the decision and its reason are logged (INFO, logger `drophot`). The random state is
    restored.

    Images are stored with their channels last, which convolutions prefer; shapes do not change.

    Args:
        dataset: Samples `(input, target)` or `(input, target, index)`, inputs of one shape.
        device: The device of the tensors.
        cache: `"auto"` decides as above, and does not cache a dataset that takes more than half of
            the device's free memory. `True` caches the samples as they are read now, in any case.
            `False` returns the dataset as it is.

    Returns:
        A `TensorDataset`, or `dataset` itself.

    Raises:
        ValueError: If the dataset is empty or its samples differ in shape.
        TypeError: If the dataset is not map-style, its samples are not tuples of tensors and
            numbers, or `cache` is something else.

    Example:
        >>> data = in_memory([(torch.zeros(2), 0), (torch.ones(2), 1)], "cpu")
        >>> data.tensors
        (tensor([[0., 0.],
                [1., 1.]]), tensor([0, 1]))
    """
    return Kept(dataset, device, cache).data


class Kept:
    """A dataset that is cached as by `in_memory` while its samples stay the same.

    Args:
        dataset: The dataset.
        device: The device of the tensors.
        cache: As in `in_memory`.
        name: The name of the caller's argument, for errors.
        readings: The number of epochs. A dataset that is read once is not decoded in advance.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        device: torch.device | str,
        cache: Cache = "auto",
        *,
        name: str = "dataset",
        readings: float = float("inf"),
    ) -> None:
        check_cache(cache)
        self.source: Any = dataset
        self._name, self._device, self._cache, self._readings = name, device, cache, readings
        self.data: Any = dataset
        self.workers = Workers(readings=readings)  # for what is not cached
        self._epoch, self._logged, self._copied = 0, "", [False]
        with random_state.preserved_rng():
            self._decide()

    def again(self) -> Dataset[Any]:
        """The dataset to read in the next epoch, decoded again if its samples have changed."""
        self._epoch += 1
        if self._cache == "auto" and self.data is not self.source:
            if (tensors := tensors_of(self.source)) is not None and self._copy_from(tensors):
                return self.data
            cheap = tensors is not None or holds_its_samples(self.source)
            if not cheap and not self._has_changed():
                return self.data
            if cheap or is_pure(self.source):
                self.data = self.source  # frees the memory of the old samples
                with random_state.preserved_rng():
                    self._decide()
            else:
                self._do_not_keep("they changed between two epochs")
        return self.data

    def _copy_from(self, tensors: Sequence[Tensor]) -> bool:
        """Copy the current values of tensors, if their shapes and dtypes are those of before."""
        mine = self.data.tensors
        matches = len(mine) == len(tensors) and all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(mine, tensors, strict=True)
        )
        if matches and all(self._copied):
            for own, tensor in zip(mine, tensors, strict=True):
                own.copy_(tensor.detach())
        return matches and all(self._copied)

    def _decide(self) -> None:
        dataset, name = self.source, self._name
        first = stacked([first_sample(name, dataset)])
        tensors = tensors_of(dataset)
        if self._cache is False:
            self._do_not_keep("cache=False")
            return
        if tensors is None and self._cache == "auto" and self._readings <= 1:
            logger.info("`%s`: samples are not kept in memory: they are read once", name)
            return
        size = len(dataset) * sum(tensor[0].nbytes for tensor in first)
        near = tensors is not None and tensors[0].device.type == torch.device(self._device).type
        if not near and self._cache == "auto" and size > memory.available(self._device) / 2:
            self._do_not_fit(size)
            return
        if tensors is not None:
            self.data = _on(self._device, tensors)  # no decision to log
            pairs = zip(self.data.tensors, tensors, strict=True)
            self._copied = [own.data_ptr() != tensor.data_ptr() for own, tensor in pairs]
            return
        if self._cache is True or is_pure(dataset):
            why = "cache=True" if self._cache is True else "they are known to stay the same"
            tensors = self._decoded(first)
        else:
            why = "two readings gave the same"
            tensors = self._decoded_twice(first)
        if tensors is None:
            return
        self.data = _on(self._device, tensors)
        self._values = values_of(dataset)
        if self._logged != why:
            logger.info("`%s`: %d samples are kept in memory: %s", name, len(dataset), why)
        self._logged = why

    def _decoded(self, first: Sequence[Tensor]) -> tuple[Tensor, ...]:
        size = len(self.source)
        tensors = tuple(torch.empty((size, *t.shape[1:]), dtype=t.dtype) for t in first)
        for positions in _chunks(size):
            self._fill(tensors, positions)
        return tensors

    def _fill(self, tensors: Sequence[Tensor], positions: range) -> None:
        columns = read(self.source, positions, self._name)
        for tensor, column in zip(tensors, columns, strict=True):
            if column.shape[1:] != tensor.shape[1:]:
                raise ValueError(
                    f"`{self._name}` must have samples of one shape, got "
                    f"{tuple(column.shape[1:])} at position {positions[0]} and "
                    f"{tuple(tensor.shape[1:])} at position 0. Crop or resize them."
                )
            tensor[positions.start : positions.stop] = column

    def _decoded_twice(self, first: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """All samples, if a second reading in reverse order gives the same ones."""
        own = OwnRandomness(self.source)
        if own.reason is not None:
            return self._do_not_keep(own.reason)
        size = len(self.source)
        tensors = tuple(torch.empty((size, *t.shape[1:]), dtype=t.dtype) for t in first)
        before = random_state.state()

        def draws() -> bool:
            return random_state.state() != before or own.has_moved()

        for positions in _chunks(size):
            self._fill(tensors, positions)
            if draws():
                return self._do_not_keep("reading them draws random numbers")
        for positions in reversed(_chunks(size)):
            if not self._is_equal(tensors, positions[::-1]):
                return self._do_not_keep("a second reading gave other samples")
            if draws():
                return self._do_not_keep("reading them draws random numbers")
        return tensors

    def _is_equal(self, tensors: Sequence[Tensor], positions: Sequence[int]) -> bool:
        rows = torch.as_tensor(list(positions))
        columns = read(self.source, positions, self._name)
        return all(
            column.shape[1:] == tensor.shape[1:] and _equal(column, tensor[rows.to(tensor.device)])
            for tensor, column in zip(tensors, columns, strict=True)
        )

    def _has_changed(self) -> bool:
        size = len(self.source)
        if size != len(self.data) or values_of(self.source) != self._values:
            return True
        if (targets := known_targets(self.source)) is not None:
            mine = self.data.tensors[1]
            if not torch.equal(as_classes(targets).to(mine), as_classes(mine)):
                return True
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(self._epoch))
        with random_state.preserved_rng():
            same = self._is_equal(self.data.tensors, drawn[:_NUM_REREAD].tolist())
        self._values = values_of(self.source)  # reading may have changed counters
        return not same

    def _do_not_keep(self, why: str) -> None:
        self.data = self.source
        logger.info(
            "`%s`: samples are not kept in memory but read again in each epoch: %s", self._name, why
        )

    def _do_not_fit(self, size: int) -> None:
        inner = self.source
        while is_plainly(inner, Subset) or is_plainly(inner, IndexedDataset):
            inner = inner.dataset
        level = logging.INFO if _was_warned_about(inner) else logging.WARNING
        logger.log(
            level,
            "`%s`: %d samples of %.1f GB in total do not fit in memory (%s). They are read again "
            "in each epoch, which is slower",
            self._name,
            len(self.source),
            size / 1e9,
            self._device,
        )


def _was_warned_about(dataset: Any) -> bool:
    """Whether a warning about this dataset was logged before. Afterwards it counts as logged."""
    try:
        known = dataset in _warned
        _warned.add(dataset)
    except TypeError:  # an object without weak references, such as a list
        return False
    return known


def _on(device: torch.device | str, tensors: Sequence[Tensor]) -> TensorDataset:
    inputs, *rest = (tensor.detach().to(device) for tensor in tensors)
    if inputs.dim() == 4 and inputs.nbytes <= memory.available(device) / 2:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return TensorDataset(inputs, *rest)


def _chunks(size: int) -> list[range]:
    return [range(start, min(start + _CHUNK_SIZE, size)) for start in range(0, size, _CHUNK_SIZE)]


def _equal(one: Tensor, other: Tensor) -> bool:
    one = one.to(other.device)
    return torch.equal(one, other) or bool(
        ((one == other) | ((one != one) & (other != other))).all()  # NaN is the same as NaN
    )
