"""Selection of a coreset by scores: `select`."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from drophot._core import scalars
from drophot._core.arrays import IntArray, as_indices
from drophot._core.ratios import check_keep_ratio
from drophot.coreset.beta_sampling import Beta, check_confidence, draw_by_density
from drophot.coreset.builtin_selectors import SELECTORS, ByScore, Random
from drophot.coreset.class_balance import check_targets
from drophot.coreset.score_ranking import check_no_nan, check_scores, select_by_score
from drophot.coreset.selectors import (
    Evidence,
    Selector,
    check_evidence,
    check_selector,
    checked_indices,
    is_selector,
)
from drophot.coreset.stratified import Stratified, check_cutoff, draw_from_strata

Word = Literal["high", "low", "random"]
Mode = Word | Stratified | Selector
WORDS = get_args(Word)


def select(
    scores: Tensor | ArrayLike,
    ratio: float,
    mode: Mode = "high",
    *,
    targets: Tensor | ArrayLike | None = None,
    among: Tensor | ArrayLike | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Keep the fraction `ratio` of the samples, by default those with the highest scores.

    `ratio` is the fraction **kept**: exactly `K = max(1, floor(ratio * N + 0.5))` of `N` samples.
    Ties are broken at random by a hash of `seed` and the sample's index that is the same on every
    device and in every version, so the result is reproducible everywhere. With "high", "low" and
    "random", the selection for a smaller ratio is a subset of that for a larger one with the same
    `seed` (with `targets`, except for one sample per class that the rounding of the classes' shares
    may move).

    References:
        Gupta et al., Drop it Like it's Hot: Network Pruning with Data Selection, section 4.2
        ("high" and "low"). The tie-breaking hash is SplitMix64: Steele et al., Fast Splittable
        Pseudorandom Number Generators, 2014, https://doi.org/10.1145/2660193.2660195.

    Args:
        scores: One real number per sample, shape `(N,)`: forgetting scores or any others.
        ratio: The fraction kept, in (0, 1].
        mode: `"high"` keeps the samples with the highest scores and `"low"` those with the lowest.
            `"random"` keeps a uniformly random subset of the same size, the control that every
            score has to beat. A :class:`Stratified` keeps samples of all difficulties. Any other
            :class:`drophot.coreset.Selector` that needs only scores and targets works, too.
        targets: The samples' classes, integers, shape `(N,)`. If they are given, each class keeps
            its share of `K` by the method of largest remainders, and the mode is applied within the
            classes. A class whose share rounds to 0 keeps no sample. A selector of your own
            receives the targets and decides itself.
        among: The indices of the candidates, such as `train.indices` of a `random_split`. `N` is
            then their number, and `ratio` a fraction of them. The scores of the other samples are
            ignored and may be NaN.
        seed: Breaks ties and draws the random subset.

    Returns:
        The indices of the kept samples for `torch.utils.data.Subset`: int64, ascending, unique,
        shape `(K,)`, on the CPU. With `among`, they are still indices into all samples.

    Raises:
        TypeError: If `ratio` is not a number, `seed` is not an integer, `scores` are not real
            numbers, or `targets` or `among` are not integers.
        ValueError: If `ratio` is not in (0, 1]; if `mode` is unknown, needs more than scores and
            targets, returns an invalid selection, or has a cutoff that leaves less than the ratio;
            if `scores` is empty or not one-dimensional, or holds NaN, a masked number or, for a
            `Stratified`, infinity among the candidates; if `targets` has another length; or if
            `among` is empty, is out of range, or names a sample twice.

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
    selector = SELECTORS[mode] if isinstance(mode, str) else mode
    seed = scalars.integer("seed", seed)
    values = check_scores(scores)
    part = None if among is None else _check_among(among, len(values))
    if _is_builtin(selector) and not (selector.balanced and targets is None):
        if isinstance(selector, Stratified):
            draw = partial(draw_from_strata, selector)
        elif isinstance(selector, Beta):
            check_confidence(selector, len(values))
            draw = partial(draw_by_density, selector, ratio)
        else:
            draw = selector.draw
        return select_by_score(draw, values, ratio, targets=targets, among=part, seed=seed)
    return _select_by(selector, values, ratio, targets, part, seed)


def check_mode(name: str, mode: Any, ratio: float = 0.0) -> None:
    """Raise a ValueError if a mode is unknown, or its cutoff leaves less than `ratio`."""
    if isinstance(mode, Stratified):
        check_cutoff(mode, ratio)
    elif is_selector(mode):
        check_selector(name, mode)
    elif not isinstance(mode, str) or mode not in WORDS:
        raise ValueError(
            f'`{name}` must be "high", "low", "random", a Stratified() or another selector (an '
            f"object with `name`, `needs` and `select`), got {mode!r}."
        )


def _is_builtin(selector: Selector) -> TypeGuard[ByScore | Random | Stratified | Beta]:
    """Whether a selector draws as the built-in ones do; a subclass may have its own `select`."""
    builtin: tuple[object, ...] = (
        ByScore.select,
        Random.select,
        Stratified.select,
        Beta.select,
    )
    return getattr(type(selector), "select", None) in builtin


def _select_by(
    selector: Selector,
    scores: Tensor,
    ratio: float,
    targets: Tensor | ArrayLike | None,
    part: IntArray | None,
    seed: int,
) -> Tensor:
    """The selection of a user's selector, which receives the evidence that `select` has."""
    scores = scores.clone()  # copies, so that a selector cannot change what the caller holds
    classes = None if targets is None else torch.tensor(check_targets(targets, len(scores)))
    if part is not None:
        indices = torch.from_numpy(part)
        scores = scores[indices.to(scores.device)]
        classes = None if classes is None else classes[indices]
    needs_scores = "scores" in selector.needs
    if needs_scores:
        check_no_nan(scores, part)
    evidence = Evidence(
        num_samples=len(scores), scores=scores if needs_scores else None, targets=classes
    )
    hint = " Pass `targets` to `select`."
    if "confidence" in selector.needs:
        hint = " `select` has no confidences; use the selector as the mode of DropHot or Grid."
    if "model" in selector.needs:
        hint = " `select` has no model; use the selector as the mode of DropHot or Grid."
    check_evidence(selector, evidence, hint)
    found = checked_indices(selector, selector.select(ratio, evidence, seed), ratio, len(scores))
    return found if part is None else torch.from_numpy(part)[found]


def _check_among(among: Any, total: int) -> IntArray:
    """The candidates' indices in ascending order."""
    found = as_indices("among", among, total)
    if len(found) == 0:
        raise ValueError("`among` must name at least one sample, but it is empty.")
    return np.sort(found)
