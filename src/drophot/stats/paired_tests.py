"""Means over seeds, paired differences and their tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from drophot._core import scalars
from drophot.stats.paired_t_power import scipy_distributions


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds with its confidence interval."""

    n: int
    """The number of values."""
    mean: float
    """The mean of the values."""
    std: float
    """The sample standard deviation (divided by n - 1); nan for a single value."""
    interval: tuple[float, float]
    """The t-interval of the mean; nan for a single value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The difference between two configurations that were run with the same seeds."""

    n: int
    """The number of pairs."""
    difference: float
    """The mean of a - b."""
    interval: tuple[float, float]
    """The t-interval of the mean; nan for a single pair or if all differences are equal."""
    p_value: float
    """The two-sided p-value of the paired t-test; nan for a single pair, 1 if all differences are
    equal."""
    effect_size: float
    """Cohen's d_z: the mean difference divided by the standard deviation of the differences; nan
    if that is unknown or 0."""


def estimate(values: Iterable[float], confidence: float = 0.95) -> Estimate:
    """Estimate a mean and its t-interval (Student 1908).

    Args:
        values: One value for each seed.
        confidence: The confidence level of the interval, in (0, 1).

    Returns:
        The mean, the standard deviation and the interval.

    Raises:
        TypeError: If a value is not a number.
        ValueError: If there are no values, a value is not finite, or `confidence` is out of range.
        ImportError: If SciPy is not installed.

    Example:
        >>> found = estimate([0.91, 0.93, 0.92])
        >>> print(f"{found.mean:.3f} [{found.interval[0]:.3f}, {found.interval[1]:.3f}]")
        0.920 [0.895, 0.945]
    """
    confidence = check_share("confidence", confidence)
    found = check_values("values", values)
    mean = fmean(found)
    if len(found) == 1:
        return Estimate(n=1, mean=mean, std=math.nan, interval=(math.nan, math.nan))
    spread = stdev(found)
    half = scipy_distributions().t.isf((1 - confidence) / 2, len(found) - 1)
    half = float(half) * spread / math.sqrt(len(found))
    return Estimate(n=len(found), mean=mean, std=spread, interval=(mean - half, mean + half))


def paired(a: Iterable[float], b: Iterable[float], confidence: float = 0.95) -> Paired:
    """Test the difference a - b of runs that share their seeds with the paired t-test.

    Runs with the same seed share their initial weights and the order of their samples, so pairing
    removes most of the variation between seeds.

    If all differences are equal, their spread cannot be estimated. Accuracies are counts of test
    images, so two or three seeds often agree by chance. The p-value is then 1, never 0, and the
    interval and the effect size are nan. :func:`compare` knows the size of the test set and
    therefore gives an interval in this case too.

    Args:
        a: One value for each seed.
        b: One value for each seed, in the same order.
        confidence: The confidence level of the interval, in (0, 1).

    Returns:
        The mean difference, its interval, the p-value and the effect size (Cohen's d_z,
        *Statistical Power Analysis for the Behavioral Sciences*, 1988).

    Raises:
        TypeError: If a value is not a number.
        ValueError: If the lengths differ, there are no values, a value is not finite, or
            `confidence` is out of range.
        ImportError: If SciPy is not installed.

    Example:
        >>> found = paired([0.91, 0.93, 0.92], [0.90, 0.91, 0.91])
        >>> print(f"{found.difference:+.4f}, p = {found.p_value:.3f}")
        +0.0133, p = 0.057
    """
    confidence = check_share("confidence", confidence)
    left, right = check_values("a", a), check_values("b", b)
    if len(left) != len(right):
        raise ValueError(
            f"`a` and `b` must have one value for each seed, in the same order, got {len(left)} "
            f"and {len(right)} values."
        )
    return paired_t_test(left, right, confidence, step=0.0)


def paired_t_test(
    left: Sequence[float], right: Sequence[float], confidence: float, step: float
) -> Paired:
    """The paired t-test of values that are multiples of `step`; 0 if that is unknown."""
    differences = [x - y for x, y in zip(left, right, strict=True)]
    n, mean, spread = len(differences), fmean(differences), 0.0
    if n > 1:
        # 0.9 - 0.8 and 0.8 - 0.7 differ by rounding alone.
        rounding = 8 * math.ulp(max(map(abs, (*left, *right))))
        spread, mean = (x if abs(x) > rounding else 0.0 for x in (stdev(differences), mean))
        # No seed is known more precisely than to one step. Adding a step to the spread keeps equal
        # and tied counts from being taken for certainty (tests/test_stars.py measures how often).
        spread = math.hypot(spread, step)
    if spread == 0:
        unknown = (math.nan, math.nan)
        p_value = 1.0 if n > 1 else math.nan
        return Paired(n=n, difference=mean, interval=unknown, p_value=p_value, effect_size=math.nan)
    t, effect = scipy_distributions().t, mean / spread
    half = float(t.isf((1 - confidence) / 2, n - 1)) * spread / math.sqrt(n)
    return Paired(
        n=n,
        difference=mean,
        interval=(mean - half, mean + half),
        p_value=float(2 * t.sf(abs(effect) * math.sqrt(n), n - 1)),
        effect_size=effect,
    )


def holm(p_values: Iterable[float]) -> list[float]:
    """Adjust p-values for multiple testing by Holm's method.

    If adjusted values below 0.05 are reported as findings, the probability of any false finding is
    at most 5 %.

    Args:
        p_values: The p-values, in any order. nan stays nan and does not count as a test.

    Returns:
        The adjusted p-values in the same order (Holm, *A simple sequentially rejective multiple
        test procedure*, 1979).

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is not in [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    found = [math.nan if p != p else scalars.real("p_values", p) for p in p_values]
    for p in found:
        if not (math.isnan(p) or 0 <= p <= 1):
            raise ValueError(f"`p_values` must be in [0, 1], got {p}.")
    order = sorted((i for i, p in enumerate(found) if not math.isnan(p)), key=found.__getitem__)
    reached = 0.0
    for rank, i in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * found[i]))
        found[i] = reached
    return found


def check_values(name: str, values: Iterable[float]) -> Sequence[float]:
    found = [scalars.real(name, value, "finite") for value in values]
    if not found:
        raise ValueError(f"`{name}` must have at least one value, got none.")
    for value in found:
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, got {value}.")
    return found


def check_share(name: str, value: Any) -> float:
    found = scalars.real(name, value, "in (0, 1)")
    if not 0 < found < 1:
        raise ValueError(f"`{name}` must be in (0, 1), got {found}.")
    return found
