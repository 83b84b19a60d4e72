"""Facility location by similarity, weighted by the density around each candidate."""

from __future__ import annotations

from functools import partial

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from drophot._core import scalars
from drophot._core.arrays import as_real_tensor
from drophot.coreset.greedy import Coreset, greedy
from drophot.coreset.held_facility_location import choose_from

_ROWS = 512  # rows that are sorted at a time


def density_facility_location(
    features: Tensor | ArrayLike,
    ratio: float,
    *,
    coverage: float = 0.6,
    targets: Tensor | ArrayLike | None = None,
    start: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Coreset:
    r"""Keep the fraction `ratio` that covers the data from regions of typical density: SubZeroCore.

    `ratio` is the fraction **kept**, `K = max(1, floor(ratio * N + 0.5))` samples. The objective is
    to make :math:`\sum_i \max_{j \in S} s_j \cos(x_i, x_j)` large. The weight of a candidate is
    :math:`s_j = \exp(-(r_j - \mu)^2 / (2 \sigma^2))`, where :math:`r_j` is its cosine distance to
    its `k`-th nearest neighbor, and :math:`\mu` and :math:`\sigma` are the mean and the standard
    deviation of these radii. Outliers and near-duplicates therefore have small weights. `k` is the
    smallest number for which a random subset of `K` of the `N` samples would contain one of the `k`
    nearest neighbors of a sample with a probability of at least `coverage`:
    :math:`1 - \prod_{m=1}^{k} (N - K - m) / (N - m)`.

    The method needs no training: the features can be those of a network that was trained on other
    data. It is the exact greedy algorithm of :func:`drophot.facility_location` with other
    distances. It runs on the CPU and holds those of all pairs, `4 * N²` bytes for float32 features;
    with `targets`, `N` is the size of the largest class, and each class is covered alone.

    References:
        Moser et al., SubZeroCore: A Submodular Approach with Zero Training for Coreset Selection,
        2025, https://arxiv.org/abs/2509.21748.

    Args:
        features: One row per sample, shape `(N, D)`; see :func:`drophot.features`.
        ratio: The fraction kept, in (0, 1].
        coverage: The probability that defines `k`, in (0, 1).
        targets: The samples' classes, integers, shape `(N,)`. If they are given, each class keeps
            its share of `K` (largest remainders) and is covered by its own samples.
        start: The indices of samples that are already kept. They count towards `K`, cover the
            samples near them, and are not in the ranking.
        seed: Breaks ties among the shares of the classes.

    Returns:
        The coreset. Its weights are the numbers of samples that each kept sample represents. Its
        gains are those of the objective; the first one assumes that before it every sample has the
        smallest weighted similarity of any pair.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1], `coverage` is not in (0, 1), `features` is not
            finite or not two-dimensional, or `targets` or `start` do not match it.
        MemoryError: If there is not enough memory.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6, 1.7, 3.0])
        >>> rows = torch.stack([angles.cos(), angles.sin()], dim=1)
        >>> density_facility_location(rows, 0.3).indices
        tensor([2, 3])
    """
    coverage = scalars.real("coverage", coverage, "a number in (0, 1)")
    if not 0 < coverage < 1:
        raise ValueError(f"`coverage` must be in (0, 1), got {coverage:g}. For 60 %, pass 0.6.")
    rows = as_real_tensor("features", features)
    if rows.dim() == 2:
        rows = rows if rows.is_floating_point() else rows.float()
        if rows.shape[1]:  # by powers of two, so that no square overflows or underflows
            exponent = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent
            rows = torch.ldexp(rows, -exponent)
        rows = F.normalize(rows)
    choose = partial(_choose, coverage)
    return greedy(choose, _memory_needed, rows, ratio, targets, start, seed, centered=False)


def _memory_needed(total: int, width: int, size: int, item: int) -> int:
    return 2 * item * total * total + (1 << 26)  # and the near pairs, which are at most 1/16


def _choose(
    coverage: float, values: Tensor, size: int, start: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    values = values.cpu()
    negative = values @ -values.T  # the row of a candidate: minus its similarity to each sample
    neighbors = num_neighbors(len(values), size, coverage)
    if neighbors:
        negative *= _weights(negative, neighbors).to(negative)[:, None]
    return choose_from(negative, negative.sum(1, dtype=torch.float64), size, start.cpu())


def num_neighbors(total: int, size: int, coverage: float) -> int:
    """The number of neighbors within which `size` random samples of `total` cover a sample."""
    neighbors, missed = 0, 1.0
    while 1 - missed < coverage and neighbors < total - size:
        neighbors += 1
        missed *= (total - size - neighbors) / (total - neighbors)
    return neighbors


def _weights(negative: Tensor, neighbors: int) -> Tensor:
    """The weight of each candidate, by the distance to its neighbor of that number."""
    radii = []
    for begin in range(0, len(negative), _ROWS):
        part = negative[begin : begin + _ROWS].clone()
        own = torch.arange(len(part))
        part[own, begin + own] = torch.inf  # a sample is not its own neighbor
        radii.append(1 + part.kthvalue(neighbors, dim=1).values.double())
    radius = torch.cat(radii)
    deviation = radius.std(correction=0)
    if not deviation > 0:
        return torch.ones_like(radius)
    return (-((radius - radius.mean()) ** 2) / (2 * deviation**2)).exp()
