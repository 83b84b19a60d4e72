"""Values at ranks by two bounds from a random sample, in one pass over the values.

References:
    Floyd and Rivest, Expected time bounds for selection, 1975.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from drophot._core.arrays import IntArray
from drophot._core.block_threads import map_blocks, map_threads

_SMALL = 1 << 17  # values that are faster without a sample
_LARGEST_SAMPLE = 1 << 16


class Values(Protocol):
    """A one-dimensional array, or something that computes parts of one. Without NaN."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: Any, /) -> NDArray[Any]: ...


class Ranked(NamedTuple):
    """The value at a rank, how many values are less, and how many are equal."""

    value: Any
    below: int
    ties: int


class Group(NamedTuple):
    """Arrays of one dtype, and the rank (from 0) of a value among all that they hold."""

    arrays: Sequence[Values]
    rank: int


def values_at_ranks(groups: Sequence[Group], *, num_deviations: float = 6) -> list[Ranked]:
    """The value at the rank of each group, in ascending order.

    A group whose rank is not between the bounds from its sample, which are `num_deviations`
    standard deviations apart from it, is processed again with wider ones.
    """
    sizes = [sum(map(len, group.arrays)) for group in groups]
    large = [number for number, size in enumerate(sizes) if size > _SMALL]
    bounds = map_threads(lambda n: _bounds(groups[n], sizes[n], num_deviations), large)
    arrays = [
        (array, low, high)
        for number, (low, high) in zip(large, bounds, strict=True)
        for array in groups[number].arrays
    ]

    def count(number: int, block: slice) -> tuple[list[int], NDArray[Any]]:
        array, low, high = arrays[number]
        values = array[block]
        upto_low, below_high = values <= low, values < high
        masks = (values < low, upto_low, below_high, values <= high)
        counts = [int(np.count_nonzero(mask)) for mask in masks]
        return counts, values[np.flatnonzero(below_high & ~upto_low)]

    counted = iter(map_blocks(count, [len(array) for array, _, _ in arrays]))
    blocks = {number: [b for _ in groups[number].arrays for b in next(counted)] for number in large}
    limits = dict(zip(large, bounds, strict=True))

    def select(number: int) -> Ranked | None:
        rank = groups[number].rank
        if number in blocks:
            return _between(blocks[number], *limits[number], rank)
        return _ranked(np.concatenate([array[:] for array in groups[number].arrays]), rank)

    found = map_threads(select, range(len(groups)))
    missed = [group for group, ranked in zip(groups, found, strict=True) if ranked is None]
    again = iter(values_at_ranks(missed, num_deviations=4 * num_deviations + 1) if missed else ())
    return [next(again) if ranked is None else ranked for ranked in found]


def _between(
    blocks: Sequence[tuple[list[int], NDArray[Any]]], low: Any, high: Any, rank: int
) -> Ranked | None:
    """The value at a rank from what `count` found; `None` if it is not between the bounds."""
    counts, between = zip(*blocks, strict=True)
    below_low, upto_low, below_high, upto_high = np.sum(counts, axis=0).tolist()
    if below_low <= rank < upto_low:
        return Ranked(low, below_low, upto_low - below_low)
    if upto_low <= rank < below_high:
        value, below, ties = _ranked(np.concatenate(between), rank - upto_low)
        return Ranked(value, upto_low + below, ties)
    if below_high <= rank < upto_high:
        return Ranked(high, below_high, upto_high - below_high)
    return None


def _ranked(values: NDArray[Any], rank: int) -> Ranked:
    """The value at a rank of an array, which is reordered."""
    values.partition(rank)
    value = values[rank]
    below, upto = np.count_nonzero(values < value), np.count_nonzero(values <= value)
    return Ranked(value, int(below), int(upto - below))


def _bounds(group: Group, total: int, num_deviations: float) -> tuple[Any, Any]:
    """Two values of a sample that the value at a rank is almost certainly between."""
    size = min(max(total >> 6, 1 << 12), _LARGEST_SAMPLE)
    # The positions are random, so no order of the values is worse than another.
    draws = np.random.default_rng(0).integers(total, size=size)
    if len(group.arrays) > 1:
        draws.sort()
    sample = np.sort(_at(group.arrays, draws))
    share = group.rank / total
    width = num_deviations * (sqrt(share * (1 - share) * size) + 1)
    low, high = share * size - width, share * size + width
    lowest = _extreme(group.arrays, np.min) if low < 0 else sample[int(low)]
    highest = _extreme(group.arrays, np.max) if high >= size - 1 else sample[int(high) + 1]
    return lowest, highest


def _at(arrays: Sequence[Values], positions: IntArray) -> NDArray[Any]:
    """The values at positions, ascending ones if there are several arrays, of all arrays."""
    if len(arrays) == 1:
        return arrays[0][positions]
    ends = np.cumsum([len(array) for array in arrays])
    parts = np.split(positions, np.searchsorted(positions, ends)[:-1])
    starts = [0, *ends.tolist()]
    return np.concatenate([a[p - s] for a, p, s in zip(arrays, parts, starts, strict=False)])


def _extreme(arrays: Sequence[Values], function: Any) -> Any:
    found = map_blocks(lambda n, block: function(arrays[n][block]), map(len, arrays))
    return function(np.array([value for own in found for value in own]))
