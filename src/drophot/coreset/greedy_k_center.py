"""Centres that leave no sample far away: greedy k-center."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core.onednn_linear import product
from drophot._core.seeded_draw import draw
from drophot.coreset.greedy import Coreset, greedy, rows, square_norms

_CANDIDATES = 2048


def k_center(
    features: Tensor | ArrayLike,
    ratio: float,
    *,
    targets: Tensor | ArrayLike | None = None,
    start: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Coreset:
    r"""Keep a share `ratio` of the samples so that none is far from one that is kept.

    `ratio` is the share **kept**, `K = max(1, floor(ratio * N + 0.5))` samples. Each choice is the
    sample that is farthest, in Euclidean distance, from all chosen before: the greedy algorithm,
    exactly, whose largest distance is at most twice the least possible. It seeks out the edges of
    the data, and so its outliers: wrong labels that look odd are kept.

    Without `targets` a smaller ratio's ranking is the beginning of a larger one's. Runs on the
    features' device, in their precision, at least float32: distances that are a thousandth of the
    largest are rough in it, and exact in float64. Most choices look at a few thousand far samples
    only; all others catch up in blocks, by matrix products. Memory beside the features is a copy of
    them, some numbers a sample and 2,048 candidates: it is logged (`logging.getLogger("drophot")`)
    and refused before the start if it is not there.

    References:
        Gonzalez, Clustering to minimize the maximum intercluster distance, 1985,
        https://doi.org/10.1016/0304-3975(85)90224-5. Sener and Savarese, Active Learning for
        Convolutional Neural Networks: A Core-Set Approach, ICLR 2018,
        https://openreview.net/forum?id=H1aIuk-RW.

    Args:
        features: One row for each sample, shape `(N, D)`: see :func:`drophot.coreset`.
        ratio: The share kept, in (0, 1].
        targets: The samples' classes, integers, shape `(N,)`. Given, each class keeps its share of
            `K` (largest remainders) and is covered by itself.
        start: Positions of samples that are kept already. They count in `K`, cover what is near
            them, and are not in the ranking.
        seed: Draws the first sample where there is no start, and breaks ties among the classes'
            shares. Equal distances go to the first of the samples, as far as the features'
            precision holds the squares of their differences: for whole numbers of few digits.

    Returns:
        The coreset. Its gains are the distances at which the samples were chosen, falling, in the
        features' unit; infinity for a first sample. It has no weights.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If `ratio` is not in (0, 1], `features` is not finite or not of two dimensions,
            or `targets` or `start` do not fit them.
        MemoryError: If there is not enough memory.

    Example:
        >>> found = k_center([[0.0], [1.0], [10.0], [11.0]], 0.5, start=[0])
        >>> found.indices, found.gains
        (tensor([0, 3]), tensor([11.]))
    """
    return greedy(_choose, _needs, features, ratio, targets, start, seed)


def _needs(total: int, width: int, size: int, item: int) -> int:
    few = min(total, _CANDIDATES)
    return item * (total * 5 + few * (2 * width + 8) + 3 * size * (width + 1) + (1 << 21))


def _choose(values: Tensor, size: int, start: Tensor, seed: int) -> tuple[Tensor, Tensor, None]:
    total, device = len(values), values.device
    norms = square_norms(values)
    centres = values.new_empty(size, values.shape[1])
    chosen, gains = [], []
    # Squared distances to the nearest centre among those that all have been held against; the
    # distances to all centres are at most these. -1 is a centre itself.
    nearest = values.new_full((total,), torch.inf)
    nearest[start.to(device)] = -1
    centres[: len(start)] = values[start.to(device)]
    done, count = 0, len(start)
    if not count:
        first = int(draw(lambda: [np.arange(total)], total, 1, seed, stream=1)[0])
        chosen, gains, count = [first], [torch.inf], 1
        centres[0], nearest[first] = values[first], -1
    while count < size:
        _catch_up(nearest, values, norms, centres[done:count])
        done = count
        few = _farthest(nearest, min(_CANDIDATES, total))
        rest = nearest.clone()
        rest[few] = -1
        edge = float(rest.amax())  # nobody else is farther than this
        near, own, squares = nearest[few], values[few], norms[few]
        while count < size:
            place = int((near == near.amax()).nonzero()[0, 0])
            far = float(near[place])
            if count > done and far <= edge:
                break
            # Of equal ones the first of all is taken, which only who knows all can say.
            tied = count == done and far == edge
            chosen.append(int((nearest == far).nonzero()[0, 0] if tied else few[place]))
            nearest[chosen[-1]] = -1
            near[few == chosen[-1]] = -1
            gains.append(max(far, 0.0) ** 0.5)
            centre = centres[count] = values[chosen[-1]]
            count += 1
            _take(near, own, squares, centre[None])
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(gains, dtype=torch.float64), None


def _farthest(nearest: Tensor, few: int) -> Tensor:
    return nearest.topk(few).indices.sort().values


def _catch_up(nearest: Tensor, values: Tensor, norms: Tensor, centres: Tensor) -> None:
    for block in rows(len(values), len(centres)):
        _take(nearest[block], values[block], norms[block], centres)


def _take(nearest: Tensor, values: Tensor, norms: Tensor, centres: Tensor) -> None:
    """Lower the squared distances to those of the centres, in place; what is -1 stays."""
    squares = centres.square().sum(1)
    products = product(values, -2 * centres, squares).amin(1)
    torch.minimum(nearest, products.add_(norms).clamp_(min=0), out=nearest)
