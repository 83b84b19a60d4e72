"""Medoids that stand for all samples: facility location by lazy greedy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._greedy import Coreset, greedy, rows
from drophot._linear import product

_DISTANCES = 1 << 26  # distances that are kept at a time
_POOL = 1024  # candidates whose distances to all samples are kept, at most
_BATCH = 256  # candidates whose gains are computed at once


def facility_location(
    features: Tensor | ArrayLike,
    ratio: float,
    *,
    targets: Tensor | ArrayLike | None = None,
    start: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Coreset:
    r"""Keep a share `ratio` of the samples that stand for the rest: medoids, with weights.

    `ratio` is the share **kept**, `K = max(1, floor(ratio * N + 0.5))` samples. They are to make
    :math:`\sum_i \min_{j \in S} \lVert x_i - x_j \rVert` small, the distance of each sample to the
    kept one nearest to it, which is the weighted coreset's error in the mean feature; on features
    softmax − one-hot, in the mean gradient. Each choice is the sample that lowers the sum most (the
    greedy algorithm, exactly); since gains only fall, most of them need not be computed anew (lazy
    greedy).

    A smaller ratio's ranking is the beginning of a larger one's. Runs on the features' device, in
    their precision, at least float32, and takes time in proportion to `N²` (with `targets`, to the
    sum of the classes' squares). The distances of all pairs are never held: beside a copy of the
    features memory is some numbers a sample and at most 2²⁶ distances, 0.27 GB in float32. It is
    logged (`logging.getLogger("drophot")`) and refused before the start if it is not there.

    References:
        Mirzasoleiman, Bilmes and Leskovec, Coresets for Data-efficient Training of Machine Learning
        Models (CRAIG), ICML 2020, https://arxiv.org/abs/1906.01827. Minoux, Accelerated greedy
        algorithms for maximizing submodular set functions, 1978,
        https://doi.org/10.1007/BFb0006528.

    Args:
        features: One row for each sample, shape `(N, D)`: see :func:`drophot.features`.
        ratio: The share kept, in (0, 1].
        targets: The samples' classes, integers, shape `(N,)`. Given, each class keeps its share of
            `K` (largest remainders), by its own medoids.
        start: Positions of samples that are kept already. They count in `K`, stand for what is near
            them, and are not in the ranking.
        seed: Changes nothing, as nothing is drawn; every selector takes one.

    Returns:
        The coreset. Its weights are the numbers of samples that each stands for; its gains, by how
        much each choice lowered the sum, falling, in the features' unit. The first is counted from
        every sample lying as far off as the two samples that are farthest apart.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `ratio` is not in (0, 1], `features` is not finite or not of two dimensions,
            or `targets` or `start` do not fit them.
        MemoryError: If there is not enough memory.

    Example:
        >>> found = facility_location([[0.0], [1.0], [2.0], [10.0], [11.0]], 0.4)
        >>> found.ranking, found.gains
        (tensor([2, 3]), tensor([35., 16.]))
        >>> found.indices, found.weights
        (tensor([2, 3]), tensor([3., 2.]))
    """
    return greedy(_choose, _needs, features, ratio, targets, start, seed)


def _needs(total: int, width: int, size: int, item: int) -> int:
    pool = _capacity(total)
    return item * (total * (width + 8) + pool * (total + width) + _BATCH * width + (1 << 21))


def _capacity(total: int) -> int:
    return min(total, _POOL, max(16, _DISTANCES // total))


def _choose(values: Tensor, size: int, start: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    state = _Medoids(values, start.to(values.device))
    chosen, gains = [], []
    while len(chosen) < size - len(start):
        while not state.pool_has_the_best():
            state.refill()
        found, gain = state.take()
        chosen.append(found)
        gains.append(gain)
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(gains), state.owner


class _Medoids:
    """What each sample is away from the nearest medoid, and what each candidate could gain."""

    def __init__(self, values: Tensor, start: Tensor) -> None:
        self.values = values
        self.norms = values.square().sum(1)
        self.count = len(start)
        total, capacity, device = len(values), _capacity(len(values)), values.device
        self.owner = torch.zeros(total, dtype=torch.int64, device=device)
        if len(start):
            self.nearest = torch.full_like(self.norms, torch.inf)
            for block in rows(total, len(start)):
                near = self._distances(start, block).min(0)
                self.nearest[block], self.owner[block] = near
            self.nearest[start], self.owner[start] = 0, torch.arange(len(start), device=device)
            self.bounds = self._all_gains()  # never less than what a candidate gains
            self.bounds[start] = -torch.inf
        else:
            sums, largest = self._sums()
            self.nearest = torch.full_like(self.norms, largest)
            self.bounds = total * largest - sums
        # The candidates of the pool, how far each sample is from each of them, by how much each
        # would lower the sum, or less, and after how many medoids that was computed.
        self.pool = torch.full((capacity,), -1, device=device)
        self.columns = values.new_empty(capacity, total)
        self.upper = values.new_full((capacity,), -torch.inf)
        self.fresh = [0] * capacity
        self.outside = torch.inf  # the most that anybody else could

    def pool_has_the_best(self) -> bool:
        """Make the largest gain in the pool exact, and hold it against all others' bounds."""
        while True:
            best, place = self.upper.max(0)
            self.place, self.gain = int(place), float(best)
            if self.gain < self.outside:
                return False
            if self.fresh[self.place] == self.count:
                return True
            gain = (self.nearest - self.columns[self.place]).clamp_(min=0).sum()
            self.upper[self.place] = gain
            self.fresh[self.place] = self.count

    def refill(self) -> None:
        """Take the most promising candidates into the pool, the best one among them."""
        there = self.pool >= 0
        self.bounds[self.pool[there]] = self.upper[there]
        for exact in (False, True):
            self._fill(self.bounds.topk(len(self.pool)).indices)
            self.bounds[self.pool] = self.upper
            others = self.bounds.clone()
            others[self.pool] = -torch.inf
            outside, best = float(others.amax()), float(self.upper.amax())
            self.outside = min(outside, best)
            if exact or outside <= best:  # once exact, what is above is rounding
                return
            # Old bounds promise more than the best of the pool gives: compute all of those anew,
            # after which the best one comes first.
            stale = (others > best).nonzero()[:, 0]
            if 2 * len(stale) > len(others):
                gains = self._all_gains()
                self.bounds[stale] = gains[stale]
            else:
                self.bounds[stale] = self._gains(stale)

    def take(self) -> tuple[int, float]:
        """The best candidate becomes a medoid."""
        column = self.columns[self.place]
        self.owner[column < self.nearest] = self.count
        torch.minimum(self.nearest, column, out=self.nearest)
        self.upper[self.place] = -torch.inf
        self.count += 1
        return int(self.pool[self.place]), self.gain

    def _fill(self, wanted: Tensor) -> None:
        """Make the pool these; who is in it keeps the distances."""
        new = wanted[~torch.isin(wanted, self.pool)]
        free = (~torch.isin(self.pool, wanted)).nonzero()[:, 0]
        self.pool[free] = new
        for places, part in zip(free.split(_BATCH), new.split(_BATCH), strict=True):
            for block in rows(len(self.values), _BATCH):
                self.columns[places, block] = self._distances(part, block)
        self.columns[free, new] = 0  # in products a sample is a little away from itself
        for begin in range(0, len(wanted), 16):
            part = slice(begin, begin + 16)
            self.upper[part] = (self.nearest - self.columns[part]).clamp_(min=0).sum(1)
        self.upper[self.bounds[self.pool] == -torch.inf] = -torch.inf  # medoids already
        self.fresh = [self.count] * len(wanted)

    def _gains(self, candidates: Tensor) -> Tensor:
        found = self.values.new_zeros(len(candidates))
        for part, sums in zip(candidates.split(_BATCH), found.split(_BATCH), strict=True):
            for block in rows(len(self.values), _BATCH):
                lower = self.nearest[block] - self._distances(part, block)
                sums += lower.clamp_(min=0).sum(1)
        return found

    def _all_gains(self) -> Tensor:
        found = torch.zeros_like(self.nearest)
        for one, other, away in self._pairs():
            found[one] += (self.nearest[other] - away).clamp_(min=0).sum(1)
            if one != other:
                found[other] += (self.nearest[one][:, None] - away).clamp_(min=0).sum(0)
        return found

    def _sums(self) -> tuple[Tensor, float]:
        found, largest = torch.zeros_like(self.norms), self.norms.new_zeros(())
        for one, other, away in self._pairs():
            found[one] += away.sum(1)
            if one != other:
                found[other] += away.sum(0)
            largest = torch.maximum(largest, away.amax())
        return found, float(largest)

    def _pairs(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """The distances of all pairs of samples, block by block, each pair once."""
        blocks = list(rows(len(self.values), 2 * _BATCH))
        everybody = torch.arange(len(self.values), device=self.values.device)
        for number, one in enumerate(blocks):
            for other in blocks[number:]:
                yield one, other, self._distances(everybody[one], other)

    def _distances(self, candidates: Tensor, block: slice) -> Tensor:
        """From candidates to a block of samples, of the shape of both."""
        squares = product(-2 * self.values[candidates], self.values[block], self.norms[block])
        return squares.add_(self.norms[candidates][:, None]).clamp_(min=0).sqrt_()
