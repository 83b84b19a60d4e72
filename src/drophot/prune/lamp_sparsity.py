"""How many weights each layer loses when all are ranked by their LAMP scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import frexp

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drophot._core import order_statistics

_BLOCK = 1 << 13  # scores computed in one go
_ONE = int(np.float64(1.0).view(np.int64))

Floats = NDArray[np.float64]


class Scores:
    """The LAMP scores of one layer in ascending order, computed where they are asked for.

    A score is the square of a weight over the sum of all squares in its layer that are not smaller,
    in float64. It grows with the magnitude, so that the sorted magnitudes are all that is kept: a
    copy of the layer's size.

    Args:
        weight: Finite floats, of any shape.
        older: The mask of an earlier pruning; what it removed has no score.
    """

    def __init__(self, weight: Tensor, older: Tensor | None = None) -> None:
        self._dtype = weight.dtype
        keys = order_statistics.magnitude_keys(weight, older).cpu().numpy()
        keys.sort()
        self.removed = int(np.searchsorted(keys, keys.dtype.type(0)))  # by the older mask
        self._keys = keys[self.removed :]
        largest = float(self._values(self._keys[-1:])[0]) if len(self._keys) else 0.0
        # Else squares could overflow, or be none; two factors, as one could be no float.
        exponent = frexp(largest)[1]
        self._factors = 2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)
        starts = range(0, len(self._keys), _BLOCK)
        # The sum of the squares from each block's start on, and the score that stands there.
        self._rest = np.zeros(len(starts) + 1)
        for number in reversed(range(len(starts))):
            self._rest[number] = self._sums(number)[0]
        self._first = np.array([self._first_score(number) for number in range(len(starts))])
        self._known: tuple[int, Floats] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def count(self, score: float, *, below: bool) -> int:
        """How many scores are at most `score`, or `below` it."""
        side = "left" if below else "right"
        number = int(np.searchsorted(self._first, score, side)) - 1
        if number < 0:
            return 0
        if self._known is None or self._known[0] != number:
            self._known = number, self._scores(number)
        return number * _BLOCK + int(np.searchsorted(self._known[1], score, side))

    def all(self) -> Floats:
        """All scores, ascending."""
        return np.concatenate([np.empty(0), *map(self._scores, range(len(self._first)))])

    def _scores(self, number: int) -> Floats:
        """Those of a block."""
        keys, rest = self._block(number), self._sums(number)
        places = np.arange(len(keys))
        places[1:][keys[1:] == keys[:-1]] = 0
        # Equal magnitudes have equal scores: that of the first in order, who has the largest sum.
        rest = rest[np.maximum.accumulate(places)]
        scores = _quotients(self._squares(keys), rest, keys)
        scores[keys == keys[0]] = self._first[number]
        return scores

    def _first_score(self, number: int) -> np.float64:
        key = self._block(number)[:1]
        begin = int(np.searchsorted(self._keys, key[0]))  # perhaps in an earlier block
        block, place = divmod(begin, _BLOCK)
        rest = self._sums(block)[place : place + 1] if place else self._rest[block : block + 1]
        return _quotients(self._squares(key), rest, key)[0]

    def _sums(self, number: int) -> Floats:
        """The sum of the squares from each place of a block on, to the end of the layer."""
        # One addition after the other, so that no sum is less than the one after it.
        squares = self._squares(self._block(number))[::-1]
        return np.cumsum(np.concatenate([self._rest[number + 1 : number + 2], squares]))[:0:-1]

    def _squares(self, keys: NDArray[np.signedinteger]) -> Floats:
        return np.square(self._values(keys) * self._factors[0] * self._factors[1])

    def _values(self, keys: NDArray[np.signedinteger]) -> Floats:
        return torch.from_numpy(keys).view(self._dtype).double().numpy()

    def _block(self, number: int) -> NDArray[np.signedinteger]:
        return self._keys[number * _BLOCK : (number + 1) * _BLOCK]


def divide(scores: Mapping[str, Scores], names: Sequence[str], remove: int) -> dict[str, int]:
    """How many of each layer go if all are ranked together.

    Args:
        scores: Of the layers, by name.
        names: The layers that are ranked.
        remove: How many of their weights go, those that an older mask removed among them.

    Returns:
        How many go of each, by name; not less than an older mask removed.
    """
    layers = [scores[name] for name in names]
    remove -= sum(layer.removed for layer in layers)
    if remove <= 0:
        return {name: scores[name].removed for name in names}
    low, high = 0, _ONE  # the integers in the order of the scores
    while low < high:
        middle = (low + high) // 2
        if sum(layer.count(_score(middle), below=False) for layer in layers) < remove:
            low = middle + 1
        else:
            high = middle
    below = [layer.count(_score(low), below=True) for layer in layers]
    ties = [
        layer.count(_score(low), below=False) - less
        for layer, less in zip(layers, below, strict=True)
    ]
    spread = order_statistics.divide_evenly(ties, remove - sum(below))
    return {
        name: layer.removed + less + more
        for name, layer, less, more in zip(names, layers, below, spread, strict=True)
    }


def _score(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


def _quotients(squares: Floats, rest: Floats, keys: NDArray[np.signedinteger]) -> Floats:
    """The scores; only that of a zero is 0."""
    quotients = np.divide(squares, rest, out=np.zeros_like(squares), where=rest > 0)
    return np.where(keys > 0, np.maximum(quotients, np.finfo(np.float64).smallest_subnormal), 0.0)
