"""Greedy k-center: centers such that no sample is far from one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core.radix_select import has_kernels, on_device
from drophot._core.seeded_draw import draw
from drophot.coreset.greedy import Coreset, greedy, row_blocks, squared_norms

_MAX_CANDIDATES = 2048


def k_center(
    features: Tensor | ArrayLike,
    ratio: float,
    *,
    targets: Tensor | ArrayLike | None = None,
    start: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Coreset:
    r"""Keep the fraction `ratio` of the samples such that no sample is far from a kept one.

    `ratio` is the fraction **kept**, `K = max(1, floor(ratio * N + 0.5))` samples. Each step of the
    greedy algorithm selects the sample that has the largest Euclidean distance to all samples
    selected before. The result is exact, and its largest distance is at most twice the smallest
    possible one. Since the algorithm prefers the boundary of the data, it keeps outliers, including
    atypical samples with wrong labels.

    Without `targets`, the ranking for a smaller ratio is the beginning of that for a larger one.
    The computation runs on the device of the features and in their precision, at least float32.
    Distances below a thousandth of the largest are inaccurate in float32; pass float64 features to
    resolve them. Most steps look at a few thousand distant samples only, and the others are updated
    in blocks by matrix products. Besides the features, the algorithm needs memory for a copy of
    them, a few numbers per sample and 2,048 candidates. The amount is logged
    (`logging.getLogger("drophot")`) and checked in advance.

    References:
        Gonzalez, Clustering to minimize the maximum intercluster distance, 1985,
        https://doi.org/10.1016/0304-3975(85)90224-5. Sener and Savarese, Active Learning for
        Convolutional Neural Networks: A Core-Set Approach, ICLR 2018,
        https://openreview.net/forum?id=H1aIuk-RW.

    Args:
        features: One row per sample, shape `(N, D)`; see :func:`drophot.features`.
        ratio: The fraction kept, in (0, 1].
        targets: The samples' classes, integers, shape `(N,)`. If they are given, each class keeps
            its share of `K` (largest remainders) and is covered separately.
        start: The indices of samples that are already kept. They count towards `K`, cover the
            samples near them, and are not in the ranking.
        seed: Draws the first sample if there is no start, and breaks ties among the shares of the
            classes. If distances are equal, the first sample is selected, provided that the squared
            differences are exact in the precision of the features, as for small integers.

    Returns:
        The coreset, without weights. Its gains are the distances at which the samples were
        selected, non-increasing, in the unit of the features; infinity for a first sample.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ratio` is not in (0, 1], `features` is not finite or not two-dimensional, or
            `targets` or `start` do not match it.
        MemoryError: If there is not enough memory.

    Example:
        >>> found = k_center([[0.0], [1.0], [10.0], [11.0]], 0.5, start=[0])
        >>> found.indices, found.gains
        (tensor([0, 3]), tensor([11.]))
    """
    return greedy(_choose, _memory_needed, features, ratio, targets, start, seed)


def _memory_needed(total: int, width: int, size: int, item: int) -> int:
    few = min(total, _MAX_CANDIDATES)
    return item * (total * 5 + few * (2 * width + 8) + 3 * size * (width + 1) + (1 << 21))


def _choose(values: Tensor, size: int, start: Tensor, seed: int) -> tuple[Tensor, Tensor, None]:
    total, device = len(values), values.device
    norms = squared_norms(values)
    centers = values.new_empty(size, values.shape[1])
    chosen, gains = [], []
    # The squared distance of each sample to the nearest of the first `done` centers, which is an
    # upper bound of the distance to all `count` centers. Centers themselves have -1.
    nearest = values.new_full((total,), torch.inf)
    nearest[start.to(device)] = -1
    centers[: len(start)] = values[start.to(device)]
    done, count = 0, len(start)
    if not count:
        first = int(draw(lambda: [np.arange(total)], total, 1, seed, stream=1)[0])
        chosen, gains, count = [first], [torch.inf], 1
        centers[0], nearest[first] = values[first], -1
    if count < size and has_kernels([values]):
        return _choose_by_kernel(values, norms, nearest, centers[:count], size, chosen, gains)
    while count < size:
        _update_all(nearest, values, norms, centers[done:count])
        done = count
        candidates = _farthest(nearest, min(_MAX_CANDIDATES, total))
        rest = nearest.clone()
        rest[candidates] = -1
        bound = float(rest.amax())  # no other sample is farther than this
        near, own, squares = nearest[candidates], values[candidates], norms[candidates]
        while count < size:
            position = int((near == near.amax()).nonzero()[0, 0])
            distance = float(near[position])
            if count > done and distance <= bound:
                break
            # If distances are equal, the first sample is selected. It may not be among the
            # candidates; its position is known only directly after an update.
            tied = count == done and distance == bound
            chosen.append(
                int((nearest == distance).nonzero()[0, 0] if tied else candidates[position])
            )
            nearest[chosen[-1]] = -1
            near[candidates == chosen[-1]] = -1
            gains.append(max(distance, 0.0) ** 0.5)
            center = centers[count] = values[chosen[-1]]
            count += 1
            _update(near, own, squares, center[None])
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(gains, dtype=torch.float64), None


def _choose_by_kernel(
    values: Tensor,
    norms: Tensor,
    nearest: Tensor,
    centers: Tensor,
    size: int,
    chosen: list[int],
    gains: list[float],
) -> tuple[Tensor, Tensor, None]:
    """The same on a GPU; the chosen samples stay there until all are selected."""
    from drophot.coreset.k_center_kernel import add_centers

    values = values.contiguous()
    _update_all(nearest, values, norms, centers)
    with on_device(values):
        found, squares = add_centers(values, nearest, int(nearest.argmax()), size - len(centers))
    ranking = torch.cat([torch.tensor(chosen, dtype=torch.int64), found.cpu()])
    away = squares.cpu().double().clamp_(min=0).sqrt_()
    return ranking, torch.cat([torch.tensor(gains, dtype=torch.float64), away]), None


def _farthest(nearest: Tensor, count: int) -> Tensor:
    return nearest.topk(count).indices.sort().values


def _update_all(nearest: Tensor, values: Tensor, norms: Tensor, centers: Tensor) -> None:
    for block in row_blocks(len(values), len(centers)):
        _update(nearest[block], values[block], norms[block], centers)


def _update(nearest: Tensor, values: Tensor, norms: Tensor, centers: Tensor) -> None:
    """Lower the squared distances in place to those of new centers; -1 stays."""
    squares = centers.square().sum(1)
    products = torch.addmm(squares, values, (-2 * centers).T).amin(1)
    torch.minimum(nearest, products.add_(norms).clamp_(min=0), out=nearest)
