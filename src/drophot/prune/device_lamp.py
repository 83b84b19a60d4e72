"""LAMP on a GPU, with the counts of a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from drophot._core import order_statistics
from drophot.prune.lamp import LampScores, lamp_counts, magnitude_keys

_REMOVED = -1.0  # the score of a weight that the mask of an earlier pruning removed
_LEAST = 1e-280  # below it, float64 has fewer digits
_HALF_BIAS, _DIGITS = 1022, 52  # of float64


def is_used(weights: Iterable[Tensor]) -> bool:
    """Whether scores are computed on the device of the weights."""
    # In this mode torch refuses sums of floats that do not have one order.
    return _is_gpu(weights) and not torch.are_deterministic_algorithms_enabled()


class DeviceRanking:
    """The LAMP scores of all layers, in memory of the device: float64, one per weight.

    The scores of a CPU are defined by sums in one order, which a GPU cannot follow: its sums differ
    in the last digits. The threshold is therefore found on the device, and then the layers that
    have another score so close to it that its side is not certain are ranked on the CPU. All other
    counts are certain. Nearly always there is no such layer, unless scores are equal.
    """

    def __init__(self, values: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> None:
        self._values, self._earlier = values, earlier
        self._scores = {name: _scores(value, earlier.get(name)) for name, value in values.items()}
        zero = _on_device([0.0], [*self._scores.values()])
        found = _positions(self._scores.values(), zero)
        self._removed = {name: number for name, (number,) in zip(values, found, strict=True)}

    def counts(self, names: Sequence[str], remove: int) -> dict[str, int]:
        """How many weights each layer loses: see `lamp_counts`."""
        if remove <= sum(self._removed[name] for name in names):
            return {name: self._removed[name] for name in names}
        scores = [self._scores[name] for name in names]
        threshold = order_statistics.magnitude_threshold(
            order_statistics.Layers(scores, remove), signed=True
        )
        score = float(np.int64(threshold.key).view(np.float64))
        if score < _LEAST:
            return self._on_cpu(names, remove)
        # Of each two sums of n squares, as of each two quotients, the relative difference is less
        # than 2 n rounding errors. Twice that for two scores, and as much for a margin.
        margin = 16.0 * (max(map(len, scores)) + 16) * 2.0 ** -(_DIGITS + 1)
        limits = _on_device([score * (1 - margin), score * (1 + margin)], scores)
        below, up_to = zip(*_positions(scores, limits), strict=True)
        if sum(up_to) == remove:
            return dict(zip(names, up_to, strict=True))
        found = dict(zip(names, below, strict=True))
        unclear = [n for n, low, high in zip(names, below, up_to, strict=True) if low < high]
        certain = sum(found[name] for name in names if name not in unclear)
        return found | self._on_cpu(unclear, remove - certain)

    def _on_cpu(self, names: Sequence[str], remove: int) -> dict[str, int]:
        scores = {name: LampScores(self._values[name], self._earlier.get(name)) for name in names}
        return lamp_counts(scores, remove)


def _scores(weight: Tensor, earlier: Tensor | None) -> Tensor:
    """The scores of a layer in ascending order, up to rounding: see `LampScores`."""
    keys = magnitude_keys(weight, earlier).sort().values
    values = keys.clamp(min=0).view(weight.dtype).double()
    # The exponent of the largest, in two factors as in `LampScores`, whose product may overflow.
    exponent = (values[-1:].view(torch.int64) >> _DIGITS) - _HALF_BIAS
    half = exponent >> 1
    squares = values.mul_(_power_of_two(-half)).mul_(_power_of_two(half - exponent)).square_()
    rest = squares.flip(0).cumsum_(0).flip(0)
    rest = rest[torch.searchsorted(keys, keys)]  # equal magnitudes have the sum of the first
    scores = torch.where(rest > 0, squares / rest, 0.0)
    least = torch.finfo(torch.float64).smallest_normal
    scores = scores.clamp_(min=least).masked_fill_(keys == 0, 0.0)
    return scores.masked_fill_(keys < 0, _REMOVED)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + _HALF_BIAS + 1) << _DIGITS).view(torch.float64)


def _positions(scores: Iterable[Tensor], limits: Tensor) -> list[list[int]]:
    """How many scores of each layer are below each limit, with one wait for the device."""
    return torch.stack([torch.searchsorted(each, limits) for each in scores]).tolist()


def _on_device(numbers: list[float], scores: Sequence[Tensor]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).to(scores[0].device)


def _is_gpu(weights: Iterable[Tensor]) -> bool:
    devices = {weight.device for weight in weights}
    return len(devices) == 1 and devices.pop().type == "cuda"
