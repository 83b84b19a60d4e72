"""Greedy facility location: medoids that represent all samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core.block_threads import map_torch
from drophot._core.seeded_draw import BLOCK
from drophot.coreset.device_facility_location import choose_on_device, is_possible
from drophot.coreset.greedy import Coreset, greedy, row_blocks, squared_norms
from drophot.coreset.held_facility_location import choose_held

_MAX_HELD = 1 << 31  # bytes of the distances of all pairs, if they are held on a CPU
_MAX_PAIRS = 1 << 24  # distances that are stored at most
_ROWS = 512  # samples whose distances are computed at a time


def facility_location(
    features: Tensor | ArrayLike,
    ratio: float,
    *,
    targets: Tensor | ArrayLike | None = None,
    start: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Coreset:
    r"""Keep the fraction `ratio` of the samples that represent the others best: weighted medoids.

    `ratio` is the fraction **kept**, `K = max(1, floor(ratio * N + 0.5))` samples. The objective is
    to make :math:`\sum_i \min_{j \in S} \lVert x_i - x_j \rVert` small, the sum of the distances of
    the samples to their nearest kept sample. It bounds the error of the weighted coreset in the
    mean feature and, for features softmax − one-hot, in the mean gradient. Each step of the greedy
    algorithm selects the sample that reduces the sum most. The result is exact. A step changes the
    gains only through the samples that are nearest to the new medoid, so only these are processed.

    Without `targets`, the ranking for a smaller ratio is the beginning of that for a larger one.
    The computation runs on the device of the features and in their precision, at least float32.
    Distances below a thousandth of the largest are inaccurate in float32; pass float64 features to
    resolve them. The time is proportional to `N²` (with `targets`, to the sum of the squared class
    sizes). On a CPU, the distances of all pairs are computed once and held if they fit in 2 GiB, as
    those of 23,000 samples in float32 do. On a GPU that Triton supports, they are held if they fit
    in half of the free memory. Otherwise they are never held: besides a copy of the features, the
    algorithm then needs memory for a few numbers per sample and for at most 2²⁴ pairs that are
    closer to each other than to any medoid, 0.8 GB while they are sorted. That amount is logged
    (`logging.getLogger("drophot")`) and checked in advance. Of equal gains the first sample is
    selected.

    References:
        Mirzasoleiman, Bilmes and Leskovec, Coresets for Data-efficient Training of Machine Learning
        Models (CRAIG), ICML 2020, https://arxiv.org/abs/1906.01827. Minoux, Accelerated greedy
        algorithms for maximizing submodular set functions, 1978,
        https://doi.org/10.1007/BFb0006528.

    Args:
        features: One row per sample, shape `(N, D)`; see :func:`drophot.features`.
        ratio: The fraction kept, in (0, 1].
        targets: The samples' classes, integers, shape `(N,)`. If they are given, each class keeps
            its share of `K` (largest remainders) and is represented by its own medoids.
        start: The indices of samples that are already kept. They count towards `K`, represent the
            samples near them, and are not in the ranking.
        seed: Breaks ties among the shares of the classes.

    Returns:
        The coreset. Its weights are the numbers of samples that each medoid represents. Its gains
        are the reductions of the sum, non-increasing, in the unit of the features; the first one
        assumes that before it every sample is as far away as the two most distant samples are from
        each other.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1], `features` is not finite or not two-dimensional, or
            `targets` or `start` do not match it.
        MemoryError: If there is not enough memory.

    Example:
        >>> found = facility_location([[0.0], [1.0], [2.0], [10.0], [11.0], [13.0]], 1 / 3)
        >>> found.ranking, found.gains
        (tensor([2, 4]), tensor([47., 25.]))
        >>> found.indices, found.weights
        (tensor([2, 4]), tensor([3., 3.]))
    """
    return greedy(_choose, _memory_needed, features, ratio, targets, start, seed)


def _memory_needed(total: int, width: int, size: int, item: int) -> int:
    threads = torch.get_num_threads()  # each works on a block of at most 1024 by 1024 distances
    if item * total * total <= _MAX_HELD:  # and at most 1/32 of them, with their positions
        held = item * total * (total + 8) + (item + 4) * total**2 // 16
        return held + (1 << 26) + threads * item * (1 << 20)
    held = min(_MAX_PAIRS, total * total) * 48 + total * _strip(total) * 12
    return item * (total * 8 + threads * (4 << 20)) + held + 24 * total + 32 * (1 << 20)


def _strip(total: int) -> int:
    """The number of samples whose distances to all samples are computed at a time."""
    return min(max((1 << 24) // total, 64), _ROWS)


def _choose(values: Tensor, size: int, start: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    if is_possible(values):
        return choose_on_device(values, size, start)
    if not values.is_cuda and values.nbytes // values.shape[1] * len(values) <= _MAX_HELD:
        return choose_held(values, size, start)
    state = _Medoids(values, start.to(values.device))
    chosen, gains = [], []
    while len(chosen) < size - len(start):
        index = int(state.gains.argmax())
        gain = max(float(state.gains[index]), 0.0)
        gains.append(min(gain, *gains[-1:]) if gains else gain)  # despite rounding errors
        chosen.append(index)
        state.take(index)
    return (
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(gains, dtype=torch.float64),
        state.owner,
    )


class _Medoids:
    """The distance of each sample to its nearest medoid, and the exact gain of each candidate.

    A new medoid changes the distances of the samples that are nearest to it, and the gains only
    through these. While there are few medoids, the distances of those samples to all candidates are
    recomputed. A gain depends only on pairs that are closer to each other than to a medoid. Once
    there are few enough of them they are stored, and no more distances are computed.
    """

    def __init__(self, values: Tensor, start: Tensor) -> None:
        self.values = values
        self.norms = squared_norms(values)
        self.all = torch.arange(len(values), device=values.device)
        self.owner = torch.zeros_like(self.all)
        self.count = len(start)
        self.pairs: _Pairs | None = None
        if len(start):
            self.nearest = torch.full_like(self.norms, torch.inf)
            for block in row_blocks(len(values), len(start)):
                self.nearest[block], self.owner[block] = self.distances(start, block).min(0)
            self.nearest[start], self.owner[start] = 0, self.all[: len(start)]
            self.gains = self._all_gains()
            self.gains[start] = -torch.inf
        else:
            sums, largest = self._sums()
            self.nearest = torch.full_like(self.norms, largest)
            self.gains = len(values) * largest - sums
        self._keep_pairs()

    def take(self, index: int) -> None:
        """Add a candidate to the medoids."""
        if self.pairs is None:
            away = self.distances(self.all[index : index + 1], slice(None))[0]
            away[index] = 0  # by rounding, a sample has a small distance to itself
            near = self.all
        else:
            near, away = self.pairs.of(index)
        closer = away < self.nearest[near]
        changed, after = near[closer], away[closer]
        before = self.nearest[changed]
        self.nearest[changed], self.owner[changed] = after, self.count
        self.owner[index] = self.count
        self.count += 1
        if self.pairs is not None:
            self.pairs.lower(self.gains, changed, before, after)
        elif 2 * len(changed) > len(self.values):
            medoids = self.gains == -torch.inf
            self.gains = self._all_gains().masked_fill_(medoids, -torch.inf)
        else:
            self._lower(changed, before, after)
        self.gains[index] = -torch.inf
        if self.pairs is None and self.count & (self.count - 1) == 0:  # 1, 2, 4, 8, …
            self._keep_pairs()

    def _lower(self, changed: Tensor, before: Tensor, after: Tensor) -> None:
        """Lower the gains of all candidates: `changed` samples have smaller distances now."""
        parts = (tensor.split(_ROWS) for tensor in (changed, before, after))
        for part in zip(*parts, strict=True):
            blocks = list(row_blocks(len(self.values), len(part[0])))
            map_torch(partial(self._lower_block, *part), blocks, self.values.device)

    def _lower_block(self, changed: Tensor, before: Tensor, after: Tensor, block: slice) -> None:
        away = torch.maximum(self.distances(changed, block), after[:, None])
        self.gains[block] -= torch.sub(before[:, None], away, out=away).clamp_(min=0).sum(0)

    def _keep_pairs(self) -> None:
        """Store the pairs that a gain still depends on, if they are few enough."""
        total = len(self.values)
        most = min(_MAX_PAIRS, total * total // 4 + 4096)
        some = self.all[:: max(1, total // 256)]
        few = 0
        for block in row_blocks(total, len(some)):
            few += int((self.distances(some, block) < self.nearest[some][:, None]).sum())
        if few * total <= 0.8 * most * len(some):
            self.pairs = _pairs(self, most)
        if self.pairs is not None:
            medoids = self.gains == -torch.inf
            self.gains = self.pairs.gains(self.nearest).masked_fill_(medoids, -torch.inf)

    def _all_gains(self) -> Tensor:
        def gain(one: slice, other: slice, away: Tensor) -> tuple[Tensor, Tensor]:
            lowered = (self.nearest[one][:, None] - away).clamp_(min=0)
            return (self.nearest[other] - away).clamp_(min=0).sum(1), lowered.sum(0)

        found, _ = self._sums_of(gain)
        return found

    def _sums(self) -> tuple[Tensor, float]:
        found, largest = self._sums_of(lambda one, other, away: (away.sum(1), away.sum(0)))
        return found, float(largest)

    def _sums_of(
        self, function: Callable[[slice, slice, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The sums of a function of the distances of all pairs, and the largest distance.

        The function gets the distances of a block of pairs, and returns the sums of its rows and of
        its columns. Each pair is computed once.
        """

        def compute(pair: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
            away = self.distances(self.all[pair[0]], pair[1])
            return *function(*pair, away), away.amax()

        found = torch.zeros_like(self.norms, dtype=torch.float64)
        largest = self.norms.new_zeros(())
        blocks = list(row_blocks(len(self.values), _ROWS))
        for number, one in enumerate(blocks):
            pairs = [(one, other) for other in blocks[number:]]
            results = map_torch(compute, pairs, self.values.device)
            for (_, other), (of_rows, of_columns, most) in zip(pairs, results, strict=True):
                found[one] += of_rows
                if one != other:
                    found[other] += of_columns
                largest = torch.maximum(largest, most)
        return found, largest

    def distances(self, candidates: Tensor, block: slice) -> Tensor:
        """The distances from candidates to a block of samples."""
        # On some CPUs torch.sqrt is ten times slower than pow_; the bits are equal.
        return self.squares(candidates, block).pow_(0.5)

    def squares(self, candidates: Tensor, block: slice) -> Tensor:
        """The squared distances from candidates to a block of samples."""
        found = torch.addmm(self.norms[block], -2 * self.values[candidates], self.values[block].T)
        return found.add_(self.norms[candidates][:, None]).clamp_(min=0)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The stored pairs of a sample and a candidate, ordered by sample and by candidate."""

    lengths: Tensor  # how many candidates each sample has, and where its candidates begin
    begins: Tensor
    candidates: Tensor
    away: Tensor
    edges: list[int]  # where the samples of each candidate begin
    samples: Tensor
    away_from: Tensor

    def of(self, candidate: int) -> tuple[Tensor, Tensor]:
        """The samples paired with a candidate, and their distances."""
        span = slice(self.edges[candidate], self.edges[candidate + 1])
        return self.samples[span].long(), self.away_from[span]

    def gains(self, nearest: Tensor) -> Tensor:
        """The gain of each candidate."""
        found = torch.zeros_like(nearest, dtype=torch.float64)
        worth = nearest.repeat_interleave(self.lengths).sub_(self.away)
        for part, inside in zip(self.candidates.split(BLOCK), worth.split(BLOCK), strict=True):
            found.index_add_(0, part, inside.double())
        return found

    def lower(self, gains: Tensor, changed: Tensor, before: Tensor, after: Tensor) -> None:
        """Lower the gains of the candidates: `changed` samples have smaller distances now."""
        lengths = self.lengths[changed]
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        shift = (self.begins[changed] - ends + lengths).repeat_interleave(lengths)
        where = torch.arange(total, device=shift.device).add_(shift)
        far, near = before.repeat_interleave(lengths), after.repeat_interleave(lengths)
        lost = (far - torch.maximum(self.away[where], near)).clamp_(min=0)
        gains.index_add_(0, self.candidates[where], lost.double().neg_())


def _pairs(state: _Medoids, most: int) -> _Pairs | None:
    """All pairs that are closer to each other than to a medoid; None if there are too many."""
    total, number = len(state.values), 0
    lengths, candidates, away = [], [], []
    for some in state.all.split(_strip(total)):
        strip = state.squares(some, slice(None))
        strip[some - some[0], some] = 0  # by rounding, a sample has a small distance to itself
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
        samples=state.all.int().repeat_interleave(each)[order],
        away_from=far[order],
    )
