"""Which samples a pruned network gets wrong that the network before got right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drophot._core import scalars
from drophot._core.arrays import IntArray, as_real_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """The samples whose correctness pruning changed, and the share forgotten by score.

    The groups are of samples that were correct before, with ascending scores.
    """

    indices: IntArray
    """The samples that were correct before and are wrong after, ascending."""
    gained: IntArray
    """The samples that were wrong before and are correct after, ascending."""
    scores: NDArray[np.float64]
    """The mean score of each group, shape `(G,)`."""
    num_correct: IntArray
    """The number of samples in each group, shape `(G,)`."""
    num_forgotten: IntArray
    """How many of them are wrong after, shape `(G,)`."""
    intervals: NDArray[np.float64]
    """Wilson's 95 % interval of the share forgotten in each group, shape `(G, 2)`."""

    @property
    def share(self) -> float:
        """The share of the samples correct before that are wrong after."""
        return len(self.indices) / int(self.num_correct.sum())


def forgotten_by_pruning(before: Any, after: Any, scores: Any, groups: int = 10) -> Forgotten:
    """Find which samples a network gets wrong after pruning, and how hard they were.

    The accuracy of a pruned network does not tell which samples it loses. This compares the network
    before and after sample by sample, and counts those that it forgets by their score.

    Args:
        before: Whether each sample is correct before pruning, bools `(N,)`: `tracker.learned` of a
            new tracker after `tracker.observe(model, loader)`.
        after: The same after pruning, or after fine-tuning.
        scores: A score of each sample, numbers `(N,)`, for example `tracker.scores()` of the
            training.
        groups: Into how many groups of about equal size the samples correct before are divided by
            their scores, at least 1. Samples with equal scores are in the same group. If many are
            equal, as forgetting events are, there are fewer groups of different sizes.

    Returns:
        The forgotten samples and the groups.

    Raises:
        TypeError: If `before` or `after` does not hold bools, `scores` does not hold numbers, or
            `groups` is not an integer.
        ValueError: If the arguments have different shapes or are not one-dimensional, a score is
            not finite, no sample is correct before, or `groups` is less than 1.

    References:
        Hooker, Courville, Clark, Dauphin and Frome, What Do Compressed Deep Neural Networks
        Forget?, 2019, https://arxiv.org/abs/1911.05248. Wilson, Probable Inference, the Law of
        Succession, and Statistical Inference, JASA 22 (1927).

    Example:
        >>> found = forgotten_by_pruning(
        ...     before=[True, True, True, False], after=[True, True, False, True],
        ...     scores=[0, 0, 4, 9], groups=2,
        ... )
        >>> found.indices.tolist(), found.gained.tolist()
        ([2], [3])
        >>> found.scores.tolist(), found.num_forgotten.tolist()
        ([0.0, 4.0], [0, 1])
    """
    correct, later = _bools("before", before), _bools("after", after)
    values = as_real_tensor("scores", scores).detach().cpu().double().numpy()
    groups = scalars.integer("groups", groups, least=1)
    for name, found in {"after": later, "scores": values}.items():
        if found.shape != correct.shape:
            raise ValueError(
                f"`{name}` must have one entry for each of the {len(correct)} samples of "
                f"`before`, got shape {found.shape}."
            )
    if not correct.any():
        raise ValueError(
            f"`before` must be True for at least one sample, got {len(correct)} samples that are "
            f"all wrong, of which none can be forgotten."
        )
    if len(lack := (~np.isfinite(values)).nonzero()[0]):
        raise ValueError(
            f"`scores` must be finite, got {values[lack[0]]} for sample {lack[0]}. Leave out the "
            f"samples that were never presented."
        )
    lost = correct & ~later
    values, was_lost = values[correct], lost[correct]
    edges = np.quantile(values, np.arange(1, groups) / groups, method="lower")
    group = np.unique(np.searchsorted(edges, values), return_inverse=True)[1]
    sizes, counts = np.bincount(group), np.bincount(group, was_lost).astype(np.int64)
    return Forgotten(
        indices=lost.nonzero()[0],
        gained=(later & ~correct).nonzero()[0],
        scores=np.bincount(group, values) / sizes,
        num_correct=sizes,
        num_forgotten=counts,
        intervals=np.array([_wilson(int(k), int(n)) for k, n in zip(counts, sizes, strict=True)]),
    )


def _bools(name: str, value: Any) -> NDArray[np.bool_]:
    found = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    if found.dtype != bool:
        raise TypeError(
            f"`{name}` must hold bools, whether each sample is correct, got {found.dtype}. Pass "
            f"`tracker.learned` of a new tracker that observed the network."
        )
    if found.ndim != 1:
        raise ValueError(f"`{name}` must have shape (N,), got {found.shape}.")
    return found


def _wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, of which `k` of `n` were seen."""
    z = NormalDist().inv_cdf(0.975)
    middle = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)
