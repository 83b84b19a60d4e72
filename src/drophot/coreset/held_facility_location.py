"""Greedy facility location in a group whose distances fit in memory, by lazy evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drophot._core.block_threads import map_torch
from drophot.coreset.greedy import squared_norms

_ROWS = 512  # rows of a block of distances, which fits in the cache
_SLACK = 1 + 1e-5  # on bounds, which are summed in less precision than gains
_FEW = 1 / 32  # near pairs are stored once they are at most this fraction of all pairs
_BATCH = 16  # candidates that are evaluated at a time from the stored pairs


def choose_held(values: Tensor, size: int, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Select medoids on the CPU: the result of a greedy `Algorithm`.

    Each distance is computed once. Gains only decrease while medoids are added, so a gain of an
    earlier step is an upper bound (Minoux, 1978). A step evaluates candidates in the order of their
    bounds until the best gain is at least the next bound. Of equal gains the first sample is
    selected. A gain depends only on pairs that are closer to each other than to a medoid. Once they
    are few, only these are read.
    """
    return choose_from(*all_distances(values, _ROWS), size, start)


def choose_from(
    distances: Tensor, sums: Tensor, size: int, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `choose_held`, from distances `(N, N)`, a row per candidate, and the rows' sums."""
    total = len(distances)
    owner = np.zeros(total, dtype=np.int64)
    ranking: list[int] = []
    gains: list[float] = []

    def take(position: int, gain: float) -> None:
        gains.append(min(gain, gains[-1]) if gains else gain)  # despite rounding errors
        closer = rows[position] < nearest
        nearest[closer] = rows[position][closer]
        owner[closer] = owner[position] = len(start) + len(ranking)
        ranking.append(position)

    rows = distances.numpy()
    if len(start):
        near, owners = distances[start].min(0)
        owners[start] = torch.arange(len(start))
        nearest, owner = near.numpy(), owners.numpy()
    else:
        farthest = float(distances.amax())
        nearest = np.full(total, farthest, dtype=rows.dtype)
        bounds = total * farthest - sums
        position = int(bounds.argmax())
        take(position, float(bounds[position]))
    heap = _bounds(distances, torch.from_numpy(nearest), {*start.tolist(), *ranking})
    step_of_gain = [-1] * total
    pairs: _NearPairs | None = None
    count = size - len(start)
    while len(ranking) < count:
        step = len(ranking)
        bound, position = heappop(heap)
        if step_of_gain[position] == step:
            take(position, -bound)
            if len(ranking) & (len(ranking) - 1) == 0:  # 2, 4, 8, …
                pairs = pairs.still_near(nearest) if pairs else _near_pairs(rows, nearest)
            continue
        batch = [position]
        if pairs is None:
            found = [float(np.maximum(nearest - rows[position], 0).sum(dtype=np.float64))]
        else:
            while heap and len(batch) < _BATCH and step_of_gain[heap[0][1]] != step:
                batch.append(heappop(heap)[1])
            found = pairs.gains(batch, nearest)
        for position, gain in zip(batch, found, strict=True):
            step_of_gain[position] = step
            heappush(heap, (-gain, position))
    return (
        torch.tensor(ranking, dtype=torch.int64),
        torch.tensor(gains, dtype=torch.float64),
        torch.from_numpy(owner),
    )


@dataclass(frozen=True, slots=True)
class _NearPairs:
    """The samples that are nearer to a candidate than to their nearest medoid, by candidate."""

    edges: list[int]  # where the samples of each candidate begin
    samples: NDArray
    distances: NDArray

    def gains(self, candidates: list[int], nearest: NDArray) -> list[float]:
        """The gains of candidates."""
        spans = [slice(self.edges[each], self.edges[each + 1]) for each in candidates]
        samples = np.concatenate([self.samples[span] for span in spans])
        distances = np.concatenate([self.distances[span] for span in spans])
        number = np.repeat(np.arange(len(spans)), [span.stop - span.start for span in spans])
        lowered = np.maximum(nearest[samples] - distances, 0)
        return np.bincount(number, lowered, minlength=len(spans)).tolist()

    def still_near(self, nearest: NDArray) -> _NearPairs:
        """The pairs that are left with more medoids."""
        near = self.distances < nearest[self.samples]
        before = np.concatenate([[0], near.cumsum()])
        return _NearPairs(before[self.edges].tolist(), self.samples[near], self.distances[near])


def _near_pairs(rows: NDArray, nearest: NDArray) -> _NearPairs | None:
    """The near pairs, or None if they are not few."""
    total = len(rows)
    if (rows[:: max(1, total // 64)] < nearest).mean() > _FEW:
        return None
    edges, samples, distances = [0], [], []
    for begin in range(0, total, 32):
        block = rows[begin : begin + 32]
        near = np.flatnonzero(block < nearest)
        edges += (edges[-1] + np.searchsorted(near, np.arange(1, len(block) + 1) * total)).tolist()
        samples.append((near % total).astype(np.int32))
        distances.append(block.reshape(-1)[near])
    return _NearPairs(edges, np.concatenate(samples), np.concatenate(distances))


def _bounds(distances: Tensor, nearest: Tensor, taken: set[int]) -> list[tuple[float, int]]:
    """A heap of upper bounds of the gains, as negative numbers, and their samples."""
    bounds = torch.empty(len(distances), dtype=torch.float64)

    def sum_rows(block: slice) -> None:
        # One buffer for all rows: between small results, freed blocks would not be used again.
        work = distances.new_empty(min(32, len(distances)), len(distances))
        for rows, sums in zip(distances[block].split(32), bounds[block].split(32), strict=True):
            sums.copy_(torch.sub(nearest, rows, out=work[: len(rows)]).clamp_(min=0).sum(1))

    map_torch(sum_rows, _blocks(len(distances), _ROWS), distances.device)
    negative = bounds.mul_(-_SLACK).tolist()
    heap = [(bound, position) for position, bound in enumerate(negative) if position not in taken]
    heapify(heap)
    return heap


def all_distances(values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The distances `(N, N)`, of which each is computed once, and the sums of their rows.

    They are computed in blocks of `num_rows` rows and columns.
    """
    total, norms = len(values), squared_norms(values)
    found = values.new_empty(total, total)
    sums = torch.zeros(total, dtype=torch.float64, device=values.device)

    def compute(pair: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        one, other = pair
        distances = torch.addmm(norms[other], -2 * values[one], values[other].T)
        # On some CPUs torch.sqrt is ten times slower than pow_; the bits are equal.
        distances.add_(norms[one][:, None]).clamp_(min=0).pow_(0.5)
        if one == other:
            distances = distances.triu_(1).add_(distances.T.contiguous())
        else:
            found[other, one] = distances.T.contiguous()  # faster than a copy of the transpose
        found[one, other] = distances
        return distances.sum(1), distances.sum(0)

    blocks = _blocks(total, num_rows)
    for number, one in enumerate(blocks):
        pairs = [(one, other) for other in blocks[number:]]
        results = map_torch(compute, pairs, values.device)
        for (_, other), (of_rows, of_columns) in zip(pairs, results, strict=True):
            sums[one] += of_rows
            if one != other:
                sums[other] += of_columns
    return found, sums


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]
