"""LAMP: magnitudes made comparable between layers (Lee et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drophot._core import order_statistics
from drophot._core.float_keys import INTEGERS, removed_key

_BLOCK = 1 << 13  # scores computed at a time
_ONE = int(np.float64(1.0).view(np.int64))

Floats = NDArray[np.float64]


class LampScores:
    """The LAMP scores of one layer in ascending order, computed when they are needed.

    A score is the square of a weight over the sum of all squares in its layer that are not smaller,
    in float64. It grows with the magnitude, so only the sorted magnitudes are stored: a copy of
    the layer's size. Weights that the mask of an earlier pruning removed have no score.
    """

    def __init__(self, weight: Tensor, earlier: Tensor | None = None) -> None:
        self._dtype = weight.dtype
        keys = magnitude_keys(weight.detach(), earlier)
        if keys.device.type != "cpu":
            keys = keys.sort().values.cpu()
        keys = keys.numpy()
        keys.sort()
        self.num_removed = int(np.searchsorted(keys, keys.dtype.type(0)))  # by the earlier mask
        self._keys = keys[self.num_removed :]
        largest = float(self._values(self._keys[-1:])[0]) if len(self._keys) else 0.0
        # Scaled so that no square overflows or underflows. There are two factors because their
        # product may not be representable.
        exponent = frexp(largest)[1]
        self._factors = 2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)
        starts = range(0, len(self._keys), _BLOCK)
        # By block, the sum of the squares from its start to the end, and its first score.
        self._rest = np.zeros(len(starts) + 1)
        for number in reversed(range(len(starts))):
            self._rest[number] = self._sums(number)[0]
        self._first = np.array([self._first_score(number) for number in range(len(starts))])
        self._cached: tuple[int, Floats] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def count(self, score: float, *, below: bool) -> int:
        """The number of scores that are at most `score`, or `below` it."""
        side = "left" if below else "right"
        number = int(np.searchsorted(self._first, score, side)) - 1
        if number < 0:
            return 0
        if self._cached is None or self._cached[0] != number:
            self._cached = number, self._scores(number)
        return number * _BLOCK + int(np.searchsorted(self._cached[1], score, side))

    def _scores(self, number: int) -> Floats:
        """The scores of one block."""
        keys, rest = self._block(number), self._sums(number)
        positions = np.arange(len(keys))
        positions[1:][keys[1:] == keys[:-1]] = 0
        # Equal magnitudes have equal scores: that of the first of them, which has the largest sum.
        rest = rest[np.maximum.accumulate(positions)]
        scores = _quotients(self._squares(keys), rest, keys)
        scores[keys == keys[0]] = self._first[number]
        return scores

    def _first_score(self, number: int) -> np.float64:
        key = self._block(number)[:1]
        begin = int(np.searchsorted(self._keys, key[0]))  # perhaps in an earlier block
        block, position = divmod(begin, _BLOCK)
        sums = self._sums(block) if position else self._rest[block:]
        return _quotients(self._squares(key), sums[position : position + 1], key)[0]

    def _sums(self, number: int) -> Floats:
        """For each position of a block, the sum of the squares from there to the layer's end."""
        # One addition after the other, so that no sum is less than the one after it.
        squares = self._squares(self._block(number))[::-1]
        return np.cumsum(np.concatenate([self._rest[number + 1 : number + 2], squares]))[:0:-1]

    def _squares(self, keys: NDArray[np.signedinteger]) -> Floats:
        return np.square(self._values(keys) * self._factors[0] * self._factors[1])

    def _values(self, keys: NDArray[np.signedinteger]) -> Floats:
        return torch.from_numpy(keys).view(self._dtype).double().numpy()

    def _block(self, number: int) -> NDArray[np.signedinteger]:
        return self._keys[number * _BLOCK : (number + 1) * _BLOCK]


def lamp_counts(scores: Mapping[str, LampScores], remove: int) -> dict[str, int]:
    """How many weights each layer loses if the `remove` smallest scores of all of them are removed.

    Weights that an earlier mask removed are among the `remove`; no layer loses fewer than these.
    """
    remove -= sum(layer.num_removed for layer in scores.values())
    if remove <= 0:
        return {name: layer.num_removed for name, layer in scores.items()}
    low, high = 0, _ONE  # the bits of a score, integers in the order of the scores
    while low < high:
        middle = (low + high) // 2
        if sum(layer.count(_score(middle), below=False) for layer in scores.values()) < remove:
            low = middle + 1
        else:
            high = middle
    below = [layer.count(_score(low), below=True) for layer in scores.values()]
    ties = [
        layer.count(_score(low), below=False) - less
        for layer, less in zip(scores.values(), below, strict=True)
    ]
    more = order_statistics.divide_evenly(ties, remove - sum(below))
    return {
        name: layer.num_removed + less + tied
        for (name, layer), less, tied in zip(scores.items(), below, more, strict=True)
    }


def magnitude_keys(weight: Tensor, earlier: Tensor | None) -> Tensor:
    """The keys of `FloatKeys` as a tensor on the weight's device."""
    integer = INTEGERS[weight.dtype.itemsize]
    keys = weight.reshape(-1).view(integer) & torch.iinfo(integer).max
    if earlier is not None:
        removed = ~earlier.reshape(-1) & (keys == 0)
        keys.masked_fill_(removed, removed_key(weight.dtype, signed=False))
    return keys


def _score(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


def _quotients(squares: Floats, rest: Floats, keys: NDArray[np.signedinteger]) -> Floats:
    """The scores; only those of zeros are 0, despite underflow."""
    quotients = np.divide(squares, rest, out=np.zeros_like(squares), where=rest > 0)
    return np.where(keys > 0, np.maximum(quotients, np.finfo(np.float64).smallest_subnormal), 0.0)
