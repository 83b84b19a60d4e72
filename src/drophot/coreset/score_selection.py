"""From scores or features to a coreset: which samples to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core import order_statistics, scalars
from drophot._core.arrays import IntArray, as_indices, as_real_tensor
from drophot._core.exact_arithmetic import exact
from drophot._core.ratios import check_keep_ratio, num_kept
from drophot._core.seeded_draw import BLOCK, draw, position_blocks
from drophot.coreset.class_balance import check_targets, class_members, proportional_sizes
from drophot.coreset.stratified import Stratified

Word = Literal["high", "low", "random"]
Mode = Word | Stratified
WORDS = get_args(Word)


@exact()
def select(
    scores: Tensor | ArrayLike,
    ratio: float,
    mode: Mode = "high",
    *,
    targets: Tensor | ArrayLike | None = None,
    among: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Keep a share `ratio` of the samples: those of the highest or lowest scores, or any.

    `ratio` is the share **kept**. Of `N` samples `K = max(1, floor(ratio * N + 0.5))` are kept,
    exactly. Equal scores are broken at random: by a hash of `seed` and the sample's position that
    is the same on every device and in every version, and so the coreset is too. For one `seed` a
    smaller ratio's coreset is part of a larger one's (with `targets`, save for the sample by
    which the rounding of the shares can move a class).

    References:
        Gupta et al., Drop it Like it's Hot: Network Pruning with Data Selection, section 4.2
        ("high" and "low"). The tie-breaking hash is SplitMix64's: Steele et al., Fast Splittable
        Pseudorandom Number Generators, 2014, https://doi.org/10.1145/2660193.2660195.

    Args:
        scores: One real number for each sample, shape `(N,)`: forgetting scores, or any others.
        ratio: The share kept, in (0, 1].
        mode: `"high"` keeps the highest scores, `"low"` the lowest, `"random"` a uniformly random
            subset of the same size, the control that a score has to beat; a :class:`Stratified`
            some of every difficulty.
        targets: The samples' classes, integers, shape `(N,)`. Given, each class keeps its share
            of `K` by the method of largest remainders, and the mode chooses within the classes. A
            class whose share rounds to 0 keeps nothing.
        among: The positions of the samples to choose from, such as `train.indices` of a
            `random_split`. `N` is then their number, and `ratio` the share of them; of the other
            samples neither scores (they may be NaN) nor classes count.
        seed: Breaks ties and draws the random subset.

    Returns:
        The positions of the kept samples, int64, ascending, unique, shape `(K,)`, on the CPU, for
        `torch.utils.data.Subset`; with `among` too they are positions among all samples.

    Raises:
        TypeError: If `ratio` is not a number, `seed` not an integer, `scores` not real numbers, or
            `targets` or `among` not of integers.
        ValueError: If `ratio` is not in (0, 1], `mode` is unknown or its cutoff leaves less than
            the ratio, `scores` is empty, not of one dimension, or holds a NaN, a masked number or,
            for a `Stratified`, an infinity among the samples to choose from, `targets` has another
            length, or `among` is empty, out of range, or names a sample twice.

    Example:
        >>> scores = torch.tensor([0, 3, 1, 7, 0, 2])
        >>> select(scores, 0.5)
        tensor([1, 3, 5])
        >>> select(scores, 1 / 3, "low")
        tensor([0, 4])
        >>> select(scores, 0.5, targets=[0, 0, 0, 0, 1, 1])
        tensor([1, 3, 5])
        >>> select(scores, 0.5, among=[0, 1, 2, 4])
        tensor([1, 2])
    """
    ratio = check_keep_ratio("ratio", ratio)
    check_mode("mode", mode, ratio)
    seed = scalars.integer("seed", seed)
    values = _check_scores(scores)
    total = len(values)
    classes = None if targets is None else check_targets(targets, total)
    part = None if among is None else _check_among(among, total)
    if part is not None:
        values = values[torch.from_numpy(part).to(values.device)]
        classes = None if classes is None else classes[part]
    _check_known(values, part)
    size = num_kept(len(values), ratio)
    if classes is None:
        return torch.from_numpy(np.sort(_choose(values, size, mode, seed, part)))

    found = []
    groups = class_members(classes)
    for group, share in zip(
        groups, proportional_sizes(map(len, groups), size, seed).tolist(), strict=True
    ):
        if share:
            own = values[torch.from_numpy(group).to(values.device)]
            found.append(_choose(own, share, mode, seed, group if part is None else part[group]))
    return torch.from_numpy(np.sort(np.concatenate(found)))


def check_mode(name: str, mode: Any, ratio: float = 0.0) -> None:
    """Refuse an unknown mode.

    Args:
        name: What the caller calls it.
        mode: The value.
        ratio: The share kept, if it is known.

    Raises:
        ValueError: If it is unknown, or its cutoff leaves no room for the share kept.
    """
    if isinstance(mode, Stratified):
        mode.check(ratio)
    elif not isinstance(mode, str) or mode not in WORDS:
        raise ValueError(
            f'`{name}` should be "high", "low", "random" or a Stratified(). Found {mode!r}.'
        )


def _choose(
    scores: Tensor, size: int, mode: Mode, seed: int, positions: IntArray | None = None
) -> IntArray:
    """Which `size` of the scores to keep, unordered; `positions` are theirs among all samples."""
    total = len(scores)
    if isinstance(mode, Stratified):
        remaining = mode.remaining(total, size)
        easier = "low" if mode.hard == "high" else "high"
        places = np.arange(total) if positions is None else positions
        left = np.sort(_choose(scores, remaining, easier, seed, places))
        inside = torch.from_numpy(np.searchsorted(places, left))
        return mode.draw(scores[inside], left, size, seed)
    # All samples stand in one order, by score and then by hash. "low" takes it from below and
    # "high" from above, so that the two meet no sooner than they must.
    if mode == "random":
        # A stream of its own, so that the control has nothing to do with how ties fell.
        blocks = position_blocks(total) if positions is None else lambda: [positions]
        return draw(blocks, total, size, seed, stream=1)
    high = mode == "high"
    edge = _nth(scores, total - size if high else size - 1)

    def where(test: Callable[[Tensor, Tensor], Tensor]) -> Iterator[IntArray]:
        for start, block in zip(range(0, total, BLOCK), scores.split(BLOCK), strict=True):
            found = test(block, edge).nonzero()[:, 0].cpu().numpy() + start
            yield found if positions is None else positions[found]

    sure = np.concatenate(list(where(torch.gt if high else torch.lt)))
    ties = sum(int((block == edge).sum()) for block in scores.split(BLOCK))
    rest = draw(lambda: where(torch.eq), ties, size - len(sure), seed, largest=high)
    return np.concatenate([sure, rest])


def _nth(scores: Tensor, rank: int) -> Tensor:
    """The score that stands at `rank` (from 0) in ascending order."""
    if not scores.is_cuda:
        return order_statistics.kth_value(scores, rank)
    # topk is torch's parallel radix selection; unsorted, it does nothing more.
    from_below = 2 * rank < len(scores)
    size = rank + 1 if from_below else len(scores) - rank
    top = scores.topk(size, largest=not from_below, sorted=False).values
    return top.amax() if from_below else top.amin()


def _check_scores(scores: Tensor | ArrayLike) -> Tensor:
    values = as_real_tensor("scores", scores)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(
            f"`scores` should have shape (N,) with N at least 1. Found {tuple(values.shape)}."
        )
    return values


def _check_among(among: Any, total: int) -> IntArray:
    """Ascending, as all that follows is."""
    found = as_indices("among", among, total)
    if len(found) == 0:
        raise ValueError("`among` must name at least one sample, but it is empty.")
    return np.sort(found)


def _check_known(scores: Tensor, part: IntArray | None) -> None:
    if not (scores.is_floating_point() and scores.amax().isnan()):
        return
    wrong = scores.isnan().nonzero()[:, 0].cpu().numpy()
    first = wrong[0] if part is None else part[wrong[0]]
    where, cure = f"{len(scores)}", "choose among those that were, such as among=train.indices"
    if part is not None:
        where, cure = f"{len(part)} in `among`", "leave them out of `among`"
    raise ValueError(
        f"`scores` should hold no NaN and no masked number. Found {len(wrong)} of {where}, the "
        f"first at position {first}. In a tracker's scores NaN means never presented: {cure}."
    )
