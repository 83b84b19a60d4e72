"""A data set kept in memory, where that is right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from drophot._core import memory, random_state
from drophot.data.determinism import Own, is_pure
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

logger = logging.getLogger("drophot")

Cache = bool | Literal["auto"]

_CHUNK = 1024  # samples decoded in one go
_PLACES = 16  # samples that are read again before each epoch
_warned: WeakSet[Any] = WeakSet()


def check_cache(cache: Any) -> None:
    """Refuse what is no setting of the cache.

    Args:
        cache: The setting.

    Raises:
        TypeError: If it is something else.
    """
    if not (isinstance(cache, bool) or (isinstance(cache, str) and cache == "auto")):
        raise TypeError(f'`cache` should be True, False or "auto". Found {cache!r}.')


def in_memory(
    dataset: Dataset[Any], device: torch.device | str, *, cache: Cache = "auto"
) -> Dataset[Any]:
    """Decode a dataset once, to tensors on a device, where that changes nothing.

    A dataset whose samples change from one reading to the next (random augmentation, a curriculum)
    must not be frozen. With `cache="auto"` the decoded samples are kept if

    - the dataset is known to give the same ones each time: tensors, a list, or one of torchvision's
      own with transforms that draw nothing; or
    - it has no `set_epoch`, and two readings of all samples, one forwards and one backwards, are
      equal and move no random generator: not Python's, NumPy's and torch's, and none that the
      dataset, its transforms or their code hold.

    What escapes this is a change that comes less often than once in as many samples as there are,
    by random numbers from where nobody sees them; `cache=False` is for that. What was chosen for
    data that is not made of tensors is logged with its reason (INFO, logger `drophot`). Random
    state is left as it was.

    Images have their channels last in memory, as convolutions like them; shapes are as before.

    Args:
        dataset: Samples `(input, target)` or `(input, target, index)`, inputs of one shape.
        device: Where the tensors are wanted.
        cache: `"auto"` decides as above, and returns a dataset as it is that takes more than half
            of the device's free memory. `True` keeps the samples as they are read now, whatever
            they do. `False` returns the dataset as it is.

    Returns:
        A `TensorDataset`, or `dataset` itself.

    Raises:
        ValueError: If the dataset is empty or its samples differ in shape.
        TypeError: If the dataset is no map-style dataset, the samples are no tuples of tensors and
            numbers, or `cache` is something else.

    Example:
        >>> data = in_memory([(torch.zeros(2), 0), (torch.ones(2), 1)], "cpu")
        >>> data.tensors
        (tensor([[0., 0.],
                [1., 1.]]), tensor([0, 1]))
    """
    return Kept(dataset, device, cache).data


class Kept:
    """A data set as `in_memory` gives it, for as long as its samples stay the same.

    Args:
        dataset: The data set.
        device: Where the tensors are wanted.
        cache: As in `in_memory`.
        name: What the caller calls the data set.
        readings: How often it will be read. What is read once is not decoded before.
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
        self._epoch, self._said, self._copied = 0, "", [False]
        with random_state.preserved_rng():
            self._decide()

    def again(self) -> Dataset[Any]:
        """What to read in the next epoch: as before, unless the samples have changed meanwhile."""
        self._epoch += 1
        if self._cache == "auto" and self.data is not self.source:
            if (tensors := tensors_of(self.source)) is not None and self._take(tensors):
                return self.data
            cheap = tensors is not None or holds_its_samples(self.source)
            if not cheap and not self._has_changed():
                return self.data
            if cheap or is_pure(self.source):
                self.data = self.source  # its memory is free for what is read now
                with random_state.preserved_rng():
                    self._decide()
            else:
                self._let_go("they changed between two epochs")
        return self.data

    def _take(self, tensors: Sequence[Tensor]) -> bool:
        """Take over what tensors hold now, if they are like those before."""
        mine = self.data.tensors
        alike = len(mine) == len(tensors) and all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(mine, tensors, strict=True)
        )
        if alike and all(self._copied):
            for own, tensor in zip(mine, tensors, strict=True):
                own.copy_(tensor.detach())
        return alike and all(self._copied)

    def _decide(self) -> None:
        dataset, name = self.source, self._name
        first = stacked([first_sample(name, dataset)])
        tensors = tensors_of(dataset)
        if self._cache is False:
            self._let_go("cache=False")
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
            self.data = _on(self._device, tensors)  # there was nothing to choose
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
        if self._said != why:
            logger.info("`%s`: %d samples are kept in memory: %s", name, len(dataset), why)
        self._said = why

    def _decoded(self, first: Sequence[Tensor]) -> tuple[Tensor, ...]:
        size = len(self.source)
        tensors = tuple(torch.empty((size, *t.shape[1:]), dtype=t.dtype) for t in first)
        for places in _chunks(size):
            self._fill(tensors, places)
        return tensors

    def _fill(self, tensors: Sequence[Tensor], places: range) -> None:
        columns = read(self.source, places, self._name)
        for tensor, column in zip(tensors, columns, strict=True):
            if column.shape[1:] != tensor.shape[1:]:
                raise ValueError(
                    f"`{self._name}` should have samples of one shape. Found "
                    f"{tuple(column.shape[1:])} at position {places[0]} and "
                    f"{tuple(tensor.shape[1:])} at position 0; crop or resize them."
                )
            tensor[places.start : places.stop] = column

    def _decoded_twice(self, first: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """All samples, if a second reading in the opposite order finds them the same."""
        own = Own(self.source)
        if own.reason is not None:
            return self._let_go(own.reason)
        size = len(self.source)
        tensors = tuple(torch.empty((size, *t.shape[1:]), dtype=t.dtype) for t in first)
        before = random_state.state()

        def draws() -> bool:
            return random_state.state() != before or own.has_moved()

        for places in _chunks(size):
            self._fill(tensors, places)
            if draws():
                return self._let_go("reading them draws random numbers")
        for places in reversed(_chunks(size)):
            if not self._is_equal(tensors, places[::-1]):
                return self._let_go("a second reading gave other samples")
            if draws():
                return self._let_go("reading them draws random numbers")
        return tensors

    def _is_equal(self, tensors: Sequence[Tensor], places: Sequence[int]) -> bool:
        there = torch.as_tensor(list(places))
        columns = read(self.source, places, self._name)
        return all(
            column.shape[1:] == tensor.shape[1:] and _equal(column, tensor[there.to(tensor.device)])
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
            same = self._is_equal(self.data.tensors, drawn[:_PLACES].tolist())
        self._values = values_of(self.source)  # reading may have counted
        return not same

    def _let_go(self, why: str) -> None:
        self.data = self.source
        logger.info(
            "`%s`: samples are not kept in memory but read anew each epoch: %s", self._name, why
        )

    def _do_not_fit(self, size: int) -> None:
        inner = self.source
        while is_plainly(inner, Subset) or is_plainly(inner, IndexedDataset):
            inner = inner.dataset
        level = logging.INFO if _is_known(inner) else logging.WARNING
        logger.log(
            level,
            "`%s`: %d samples of together %.1f GB do not fit in memory (%s): read anew each "
            "epoch, which is slower",
            self._name,
            len(self.source),
            size / 1e9,
            self._device,
        )


def _is_known(dataset: Any) -> bool:
    """Whether it was warned about this data set before; from now on it was."""
    try:
        known = dataset in _warned
        _warned.add(dataset)
    except TypeError:  # such as a list, which nothing can point to weakly
        return False
    return known


def _on(device: torch.device | str, tensors: Sequence[Tensor]) -> TensorDataset:
    inputs, *rest = (tensor.detach().to(device) for tensor in tensors)
    if inputs.dim() == 4 and inputs.nbytes <= memory.available(device) / 2:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return TensorDataset(inputs, *rest)


def _chunks(size: int) -> list[range]:
    return [range(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)]


def _equal(one: Tensor, other: Tensor) -> bool:
    one = one.to(other.device)
    return torch.equal(one, other) or bool(
        ((one == other) | ((one != one) & (other != other))).all()  # NaN is the same as NaN
    )
