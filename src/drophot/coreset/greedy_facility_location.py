"""Medoids that stand for all samples: greedy facility location."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core.onednn_linear import product
from drophot._core.seeded_draw import BLOCK
from drophot.coreset.greedy import Coreset, greedy, rows, square_norms

_PAIRS = 1 << 24  # distances that are kept, at most
_ROWS = 512  # samples whose distances are computed at once


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
    softmax − one-hot, in the mean gradient. Each choice is the sample that lowers the sum most: the
    greedy algorithm, exactly. A choice changes the gains only by the samples that it is nearest to,
    so that only these are looked at.

    Without `targets` a smaller ratio's ranking is the beginning of a larger one's. Runs on the
    features' device, in their precision, at least float32 (distances that are a thousandth of the
    largest are rough in it, and exact in float64), and takes time in proportion to `N²` (with
    `targets`, to the sum of the classes' squares). The distances of all pairs of a large set are
    never held: beside a copy of the features memory is some numbers a sample and at most 2²⁴ pairs
    that are nearer to each other than to any medoid, 0.8 GB while they are sorted. It is logged
    (`logging.getLogger("drophot")`) and refused before the start if it is not there.

    References:
        Mirzasoleiman, Bilmes and Leskovec, Coresets for Data-efficient Training of Machine Learning
        Models (CRAIG), ICML 2020, https://arxiv.org/abs/1906.01827. Minoux, Accelerated greedy
        algorithms for maximizing submodular set functions, 1978,
        https://doi.org/10.1007/BFb0006528.

    Args:
        features: One row for each sample, shape `(N, D)`: see :func:`drophot.coreset`.
        ratio: The share kept, in (0, 1].
        targets: The samples' classes, integers, shape `(N,)`. Given, each class keeps its share of
            `K` (largest remainders), by its own medoids.
        start: Positions of samples that are kept already. They count in `K`, stand for what is near
            them, and are not in the ranking.
        seed: Breaks ties among the classes' shares.

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
        >>> found = facility_location([[0.0], [1.0], [2.0], [10.0], [11.0], [13.0]], 1 / 3)
        >>> found.ranking, found.gains
        (tensor([2, 4]), tensor([47., 25.]))
        >>> found.indices, found.weights
        (tensor([2, 4]), tensor([3., 3.]))
    """
    return greedy(_choose, _needs, features, ratio, targets, start, seed)


def _needs(total: int, width: int, size: int, item: int) -> int:
    held = min(_PAIRS, total * total) * 48 + total * _strip(total) * 12
    return item * total * 8 + held + 24 * total + 32 * (1 << 20)


def _strip(total: int) -> int:
    """How many samples' distances to all are looked at in one go."""
    return min(max((1 << 24) // total, 64), _ROWS)


def _choose(values: Tensor, size: int, start: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    state = _Medoids(values, start.to(values.device))
    chosen, gains = [], []
    while len(chosen) < size - len(start):
        place = int(state.gains.argmax())
        gain = max(float(state.gains[place]), 0.0)
        gains.append(min(gain, *gains[-1:]) if gains else gain)  # rounding makes no gain rise
        chosen.append(place)
        state.take(place)
    return (
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(gains, dtype=torch.float64),
        state.owner,
    )


class _Medoids:
    """What each sample is away from the nearest medoid, and what each candidate gains, exactly.

    A new medoid changes the distances of the samples that are nearest to it, and the gains by these
    alone. While medoids are few, the distances of those samples to all candidates are computed
    anew. Only pairs that are nearer to each other than to a medoid matter to any gain, though, and
    as soon as there are few enough of them they are kept, and no distance is computed any more.
    """

    def __init__(self, values: Tensor, start: Tensor) -> None:
        self.values = values
        self.norms = square_norms(values)
        self.everybody = torch.arange(len(values), device=values.device)
        self.owner = torch.zeros_like(self.everybody)
        self.count = len(start)
        self.pairs: _Pairs | None = None
        if len(start):
            self.nearest = torch.full_like(self.norms, torch.inf)
            for block in rows(len(values), len(start)):
                self.nearest[block], self.owner[block] = self.distances(start, block).min(0)
            self.nearest[start], self.owner[start] = 0, self.everybody[: len(start)]
            self.gains = self._all_gains()
            self.gains[start] = -torch.inf
        else:
            sums, largest = self._sums()
            self.nearest = torch.full_like(self.norms, largest)
            self.gains = len(values) * largest - sums
        self._keep_pairs()

    def take(self, place: int) -> None:
        """A candidate becomes a medoid."""
        if self.pairs is None:
            away = self.distances(self.everybody[place : place + 1], slice(None))[0]
            away[place] = 0  # in products a sample is a little away from itself
            near = self.everybody
        else:
            near, away = self.pairs.of(place)
        closer = away < self.nearest[near]
        changed, after = near[closer], away[closer]
        before = self.nearest[changed]
        self.nearest[changed], self.owner[changed] = after, self.count
        self.owner[place] = self.count
        self.count += 1
        if self.pairs is not None:
            self.pairs.lower(self.gains, changed, before, after)
        elif 2 * len(changed) > len(self.values):
            medoids = self.gains == -torch.inf
            self.gains = self._all_gains().masked_fill_(medoids, -torch.inf)
        else:
            self._lower(changed, before, after)
        self.gains[place] = -torch.inf
        if self.pairs is None and self.count & (self.count - 1) == 0:  # 1, 2, 4, 8, …
            self._keep_pairs()

    def _lower(self, changed: Tensor, before: Tensor, after: Tensor) -> None:
        """What all candidates gain less, since these samples were so far and are nearer now."""
        parts = (tensor.split(_ROWS) for tensor in (changed, before, after))
        for part, far, near in zip(*parts, strict=True):
            for block in rows(len(self.values), len(part)):
                away = torch.maximum(self.distances(part, block), near[:, None])
                self.gains[block] -= torch.sub(far[:, None], away, out=away).clamp_(min=0).sum(0)

    def _keep_pairs(self) -> None:
        """Keep the pairs that still matter to a gain, if they are few enough."""
        total = len(self.values)
        most = min(_PAIRS, total * total // 4 + 4096)
        some = self.everybody[:: max(1, total // 256)]
        few = 0
        for block in rows(total, len(some)):
            few += int((self.distances(some, block) < self.nearest[some][:, None]).sum())
        if few * total <= 0.8 * most * len(some):
            self.pairs = _pairs(self, most)
        if self.pairs is not None:
            medoids = self.gains == -torch.inf
            self.gains = self.pairs.gains(self.nearest).masked_fill_(medoids, -torch.inf)

    def _all_gains(self) -> Tensor:
        found = torch.zeros_like(self.norms, dtype=torch.float64)
        for one, other, away in self._halves():
            found[one] += (self.nearest[other] - away).clamp_(min=0).sum(1)
            if one != other:
                found[other] += (self.nearest[one][:, None] - away).clamp_(min=0).sum(0)
        return found

    def _sums(self) -> tuple[Tensor, float]:
        found = torch.zeros_like(self.norms, dtype=torch.float64)
        largest = self.norms.new_zeros(())
        for one, other, away in self._halves():
            found[one] += away.sum(1)
            if one != other:
                found[other] += away.sum(0)
            largest = torch.maximum(largest, away.amax())
        return found, float(largest)

    def _halves(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """The distances of all pairs of samples, block by block, each pair once."""
        blocks = list(rows(len(self.values), _ROWS))
        for number, one in enumerate(blocks):
            for other in blocks[number:]:
                yield one, other, self.distances(self.everybody[one], other)

    def distances(self, candidates: Tensor, block: slice) -> Tensor:
        """From candidates to a block of samples, of the shape of both."""
        # torch's sqrt goes to a library that is ten times slower on some CPUs; the bits are equal.
        return self.squares(candidates, block).pow_(0.5)

    def squares(self, candidates: Tensor, block: slice) -> Tensor:
        """Their squares."""
        found = product(-2 * self.values[candidates], self.values[block], self.norms[block])
        return found.add_(self.norms[candidates][:, None]).clamp_(min=0)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The pairs of a sample and a candidate that matter, sample by sample and the other way."""

    lengths: Tensor  # how many candidates each sample has, and where they begin
    begins: Tensor
    candidates: Tensor
    away: Tensor
    edges: list[int]  # where the samples of each candidate begin
    samples: Tensor
    away_from: Tensor

    def of(self, candidate: int) -> tuple[Tensor, Tensor]:
        """The samples of a candidate, and how far it is from them."""
        span = slice(self.edges[candidate], self.edges[candidate + 1])
        return self.samples[span].long(), self.away_from[span]

    def gains(self, nearest: Tensor) -> Tensor:
        """What each candidate gains."""
        found = torch.zeros_like(nearest, dtype=torch.float64)
        worth = nearest.repeat_interleave(self.lengths).sub_(self.away)
        for part, inside in zip(self.candidates.split(BLOCK), worth.split(BLOCK), strict=True):
            found.index_add_(0, part, inside.double())
        return found

    def lower(self, gains: Tensor, changed: Tensor, before: Tensor, after: Tensor) -> None:
        """What candidates gain less, since these samples were so far and are nearer now."""
        lengths = self.lengths[changed]
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        shift = (self.begins[changed] - ends + lengths).repeat_interleave(lengths)
        where = torch.arange(total, device=shift.device).add_(shift)
        far, near = before.repeat_interleave(lengths), after.repeat_interleave(lengths)
        lost = (far - torch.maximum(self.away[where], near)).clamp_(min=0)
        gains.index_add_(0, self.candidates[where], lost.double().neg_())


def _pairs(state: _Medoids, most: int) -> _Pairs | None:
    """All pairs that are nearer to each other than to a medoid, or nothing if they are too many."""
    total, number = len(state.values), 0
    lengths, candidates, away = [], [], []
    for some in state.everybody.split(_strip(total)):
        strip = state.squares(some, slice(None))
        strip[some - some[0], some] = 0  # in products a sample is a little away from itself
        inside = strip < state.nearest[some].square()[:, None]
        where = inside.nonzero()
        lengths.append(where[:, 0].bincount(minlength=len(some)))
        candidates.append(where[:, 1].int())
        away.append(strip[where[:, 0], where[:, 1]].pow_(0.5))
        number += len(where)
        if number > most:
            return None
    each, of, far = torch.cat(lengths), torch.cat(candidates), torch.cat(away)
    order = of.argsort(stable=True)
    ends = of.bincount(minlength=total).cumsum(0).tolist()
    return _Pairs(
        lengths=each,
        begins=each.cumsum(0) - each,
        candidates=of,
        away=far,
        edges=[0, *ends],
        samples=state.everybody.int().repeat_interleave(each)[order],
        away_from=far[order],
    )
