"""Statistics of runs over seeds: confidence intervals, paired tests and sample sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from drophot._core import scalars
from drophot._core.paired_t_power import pairs_needed, scipy_distributions
from drophot.records.cells import CELL_FIELDS, known_settings
from drophot.records.pairs import mode_name, pairs
from drophot.records.record import Record
from drophot.settings import Mode

Measure = Literal["trained_accuracy", "pruned_accuracy", "finetuned_accuracy"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A cell of a grid compared with its reference, paired by seed. Accuracies are in [0, 1].

    The fields from `model` to `structured` have the same meaning as in :class:`drophot.Record`.
    """

    model: str
    protocol: str
    mode: str
    keep_ratio: float
    prune_ratio: float
    equal_steps: bool
    reinitialized: bool
    rewound: bool
    recalibrated: bool
    schedule: str
    scope: str
    structured: bool
    against: str
    """The mode of the reference."""
    measure: str
    """The accuracy that is compared."""
    n: int
    """The number of seeds for which both have an accuracy that is not nan."""
    difference: float
    """The mean over seeds of cell minus reference; nan if there are no seeds."""
    interval: tuple[float, float]
    """The t-interval of the difference."""
    p_value: float
    """The p-value of the paired t-test, not adjusted."""
    p_holm: float
    """The p-value, adjusted for all rows of the call by Holm's method."""
    effect_size: float
    """Cohen's d_z."""
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    """The remaining settings of the cell, as far as its records hold them."""


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
    confidence = _share("confidence", confidence)
    found = _check("values", values)
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
    confidence = _share("confidence", confidence)
    left, right = _check("a", a), _check("b", b)
    if len(left) != len(right):
        raise ValueError(
            f"`a` and `b` must have one value for each seed, in the same order, got {len(left)} "
            f"and {len(right)} values."
        )
    return _paired(left, right, confidence, step=0.0)


def _paired(
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


def seeds_needed(difference: float, std: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Compute how many seeds the paired t-test needs to detect a difference.

    Args:
        difference: The true mean difference.
        std: The standard deviation of the paired differences, for example `statistics.stdev` of
            those of a pilot study.
        power: The probability of detecting the difference, in (0, 1).
        alpha: The significance level, in (0, 1).

    Returns:
        The smallest sufficient number of pairs, at least 2, by the noncentral t distribution
        (Cohen 1988).

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If `difference` is 0 or negligible compared with `std`, or an argument is out
            of range.
        ImportError: If SciPy is not installed.

    Example:
        >>> seeds_needed(0.005, std=0.01)
        34
    """
    power, alpha = _share("power", power), _share("alpha", alpha)
    difference = scalars.real("difference", difference, "finite and not 0")
    std = scalars.real("std", std, "finite and not negative")
    if not (math.isfinite(difference) and difference != 0):
        raise ValueError(f"`difference` must be finite and not 0, got {difference}.")
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"`std` must be finite and not negative, got {std}.")
    if std == 0:
        return 2
    effect = min(abs(difference) / std, 1e100)  # its square is still a finite float
    if effect < 1e-100:
        raise ValueError(
            f"`difference` must be at least 1e-100 of `std`, got {difference} and {std}. No number "
            f"of seeds detects a difference this small."
        )
    return pairs_needed(effect, power, alpha)


def compare(
    records: Iterable[Record],
    *,
    against: str | Mode = "baseline",
    measure: Measure = "finetuned_accuracy",
    confidence: float = 0.95,
) -> list[Comparison]:
    """Compare every cell of a grid with its reference, paired by seed.

    The reference of a cell has the same settings in everything but the mode. The baseline, which
    is trained on all samples, is also the reference of cells with any `keep_ratio` and any number
    of steps. A reference that uses nothing of step 1 also serves cells that were scored with
    different settings. Only seeds that both have count, and a cell that shares no seed with its
    reference is left out. If several references of one seed serve a cell, the first counts. An
    accuracy that is nan counts for no seed.

    If the size of the test set is known, no difference is taken to be more precise than one test
    image: the variance of one image is added to the variance over seeds. Equal differences would
    otherwise not count as a finding: see :func:`paired`. The p-values are adjusted for the rows of
    this call. :func:`drophot.report.differences` adjusts for the comparisons with the baseline and
    with random together, because they are in one table.

    Args:
        records: The runs.
        against: The mode of the reference: `"baseline"`, the name of any other mode in the records,
            such as `"random"` or `"fresh_subset"`, or the mode itself, such as
            `Scored(mode="random", balanced=True)` or a selector of your own.
        measure: The accuracy to compare: `"trained_accuracy"`, `"pruned_accuracy"` or
            `"finetuned_accuracy"`, each after the last epoch.
        confidence: The confidence level of the intervals, in (0, 1).

    Returns:
        One row for each cell, in the order of the records. `pandas.DataFrame(rows)` gives a table.

    Raises:
        TypeError: If an item of `records` is not a record, or `against` is not a mode.
        ValueError: If there are no records, none has the mode `against`, different objects have
            the name `against`, two different records have the same cell and seed, or `measure` is
            unknown.
        ImportError: If SciPy is not installed.

    Example:
        >>> same = dict(model="lenet", prune_ratio=0.8, sparsity=0.8, finetune_curve=())
        >>> same |= dict(trained_accuracy=0.97, pruned_accuracy=0.6, fingerprint="")
        >>> same |= dict(seconds={}, device="cpu", versions={}, num_kept=6)
        >>> share = {"baseline": 1.0, "high": 0.1}
        >>> runs = [
        ...     Record(**same, mode=m, keep_ratio=share[m], seed=seed, finetuned_accuracy=a)
        ...     for m, pair in {"baseline": (0.98, 0.99), "high": (0.96, 0.98)}.items()
        ...     for seed, a in enumerate(pair)
        ... ]
        >>> for row in compare(runs):
        ...     print(f"{row.mode}: {row.difference:+.3f}, p = {row.p_holm:.2f}")
        high: -0.015, p = 0.20
    """
    if measure not in get_args(Measure):
        raise ValueError(
            f"`measure` must be one of {', '.join(map(repr, get_args(Measure)))}, got {measure!r}."
        )
    confidence = _share("confidence", confidence)
    rows = [
        (runs[0][0], _test_pairs(runs, measure, confidence)) for runs in pairs(records, against)
    ]
    adjusted = holm(found.p_value for _, found in rows)
    return [
        Comparison(
            **{name: getattr(first, name) for name in CELL_FIELDS},
            against=mode_name(against),
            measure=measure,
            n=found.n,
            difference=found.difference,
            interval=found.interval,
            p_value=found.p_value,
            p_holm=p_holm,
            effect_size=found.effect_size,
            settings=known_settings(first),
        )
        for (first, found), p_holm in zip(rows, adjusted, strict=True)
    ]


def _test_pairs(
    runs: Sequence[tuple[Record, Record]], measure: Measure, confidence: float
) -> Paired:
    """Compare runs with their references, leaving out pairs with an accuracy that is nan."""
    found = [(getattr(run, measure), getattr(reference, measure)) for run, reference in runs]
    found = [pair for pair in found if all(map(math.isfinite, pair))]
    if not found:
        nan = math.nan
        return Paired(n=0, difference=nan, interval=(nan, nan), p_value=nan, effect_size=nan)
    sizes = {record.test_samples for pair in runs for record in pair}
    left, right = zip(*found, strict=True)
    return _paired(left, right, confidence, step=1 / min(sizes) if min(sizes) > 0 else 0.0)


def _check(name: str, values: Iterable[float]) -> Sequence[float]:
    found = [scalars.real(name, value, "finite") for value in values]
    if not found:
        raise ValueError(f"`{name}` must have at least one value, got none.")
    for value in found:
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, got {value}.")
    return found


def _share(name: str, value: Any) -> float:
    found = scalars.real(name, value, "in (0, 1)")
    if not 0 < found < 1:
        raise ValueError(f"`{name}` must be in (0, 1), got {found}.")
    return found
