"""The value at a rank by two bounds from a random sample, in one pass over the values.

References:
    Floyd and Rivest, Expected time bounds for selection, 1975.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drophot._core.block_threads import BLOCK, map_blocks

MIN_LENGTH = 1 << 20
_SAMPLE = 1 << 16


def kth_value(values: NDArray[Any], rank: int, *, num_deviations: float = 6) -> Any:
    """The value at `rank` (from 0) in ascending order, or `None` if the sample missed it.

    `values` has one dimension and no NaN. A zero is returned without a sign.
    """
    low, high = _bounds(values, rank, num_deviations)

    def count(start: int) -> tuple[list[int], NDArray[Any]]:
        block = values[start : start + BLOCK]
        upto_low, below_high = block <= low, block < high
        masks = (block < low, upto_low, below_high, block <= high)
        between = block[below_high & ~upto_low]
        return [int(np.count_nonzero(mask)) for mask in masks], between

    counts, between = zip(*map_blocks(count, len(values)), strict=True)
    below_low, upto_low, below_high, upto_high = np.sum(counts, axis=0).tolist()
    if below_low <= rank < upto_low:
        return low + values.dtype.type(0)
    if upto_low <= rank < below_high:
        position = rank - upto_low
        return np.partition(np.concatenate(between), position)[position] + values.dtype.type(0)
    if below_high <= rank < upto_high:
        return high + values.dtype.type(0)
    return None


def _bounds(values: NDArray[Any], rank: int, num_deviations: float) -> tuple[Any, Any]:
    """Two values of a sample that the value at a rank is almost certainly between."""
    # The positions are random, so no order of the values is worse than another.
    draws = np.random.default_rng(0).integers(len(values), size=_SAMPLE)
    sample = np.sort(values[draws])
    share = rank / len(values)
    width = num_deviations * (sqrt(share * (1 - share) * _SAMPLE) + 1)
    low, high = share * _SAMPLE - width, share * _SAMPLE + width
    lowest = values.min() if low < 0 else sample[int(low)]
    highest = values.max() if high >= _SAMPLE - 1 else sample[int(high) + 1]
    return lowest, highest
