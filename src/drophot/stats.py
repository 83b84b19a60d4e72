"""What a difference between runs is worth: intervals, paired tests, effect sizes, seeds needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal, get_args

import numpy as np

from drophot import cells
from drophot._core import scalars
from drophot.records import Record

Measure = Literal["trained_accuracy", "pruned_accuracy", "finetuned_accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds, and how well it is known."""

    n: int
    """The number of values."""
    mean: float
    """Their mean."""
    std: float
    """Their standard deviation (over n - 1); nan for a single one."""
    interval: tuple[float, float]
    """The t-interval of the mean; nan for a single value, which says nothing of the spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A difference between two runs of the same seeds."""

    n: int
    """The number of pairs."""
    difference: float
    """The mean of a - b."""
    interval: tuple[float, float]
    """Its t-interval; nan for a single pair, and where all differences are equal."""
    p_value: float
    """Two-sided, of the paired t-test; nan for a single pair, 1 where all differences are equal."""
    effect_size: float
    """Cohen's d_z: the mean difference over the differences' standard deviation; nan where that
    is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A cell of the grid against its reference, paired by seed. Accuracies are in [0, 1].

    `model` to `structured` are what they are in a :class:`drophot.Record` of the cell.
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
    """The mode that it is compared with."""
    measure: str
    """Which accuracy is compared."""
    n: int
    """The number of seeds that both have an accuracy for; nan, where a run diverged, is none."""
    difference: float
    """The cell minus its reference, mean over seeds; nan without any."""
    interval: tuple[float, float]
    """Its t-interval."""
    p_value: float
    """Of the paired t-test, on its own."""
    p_holm: float
    """The same, adjusted for all rows of the table (Holm)."""
    effect_size: float
    """Cohen's d_z."""
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    """The other settings of the cell, as far as they are known."""


def estimate(values: Iterable[float], confidence: float = 0.95) -> Estimate:
    """The mean of values and its t-interval (Student 1908).

    Args:
        values: One for each seed.
        confidence: The share of such intervals that hold the true mean, in (0, 1).

    Returns:
        The mean, the standard deviation and the interval.

    Raises:
        ValueError: If there is no value, one is not finite, or `confidence` is no share.
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
    half = _distributions().t.isf((1 - confidence) / 2, len(found) - 1)
    half = float(half) * spread / math.sqrt(len(found))
    return Estimate(n=len(found), mean=mean, std=spread, interval=(mean - half, mean + half))


def paired(a: Iterable[float], b: Iterable[float], confidence: float = 0.95) -> Paired:
    """The difference a - b of runs that share their seeds, by the paired t-test.

    Pairs share initial weights and the order of samples, and so most of their luck; what is left is
    what the test needs to judge.

    Differences that are all equal have no spread to judge by. Accuracies are counts of test images,
    so that two or three seeds often agree by chance: the p-value is then 1, never 0, and the
    interval and the effect size are nan. :func:`compare` knows the size of the test set, and gives
    such differences an interval.

    Args:
        a: One value for each seed.
        b: One value for each seed, in the same order.
        confidence: Of the interval, in (0, 1).

    Returns:
        The mean difference, its interval, the p-value and the effect size (Cohen's d_z,
        *Statistical Power Analysis for the Behavioral Sciences*, 1988).

    Raises:
        ValueError: If the lengths differ, there are no values, one is not finite, or `confidence`
            is no share.
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
            f"`a` and `b` should have a value for the same seeds each. Found {len(left)} and "
            f"{len(right)}."
        )
    return _paired(left, right, confidence, step=0.0)


def _paired(
    left: Sequence[float], right: Sequence[float], confidence: float, step: float
) -> Paired:
    """The paired t-test of values that are multiples of `step`; 0 where that is not known."""
    differences = [x - y for x, y in zip(left, right, strict=True)]
    n, mean, spread = len(differences), fmean(differences), 0.0
    if n > 1:
        # 0.9 - 0.8 and 0.8 - 0.7 differ by rounding alone.
        rounding = 8 * math.ulp(max(map(abs, (*left, *right))))
        spread, mean = (x if abs(x) > rounding else 0.0 for x in (stdev(differences), mean))
        # No seed is known better than to a step: one more, as a spread of its own, keeps equal and
        # tied counts from being taken for certainty (tests/test_stars.py has how often they are).
        spread = math.hypot(spread, step)
    if spread == 0:
        unknown = (math.nan, math.nan)
        p_value = 1.0 if n > 1 else math.nan
        return Paired(n=n, difference=mean, interval=unknown, p_value=p_value, effect_size=math.nan)
    t, effect = _distributions().t, mean / spread
    half = float(t.isf((1 - confidence) / 2, n - 1)) * spread / math.sqrt(n)
    return Paired(
        n=n,
        difference=mean,
        interval=(mean - half, mean + half),
        p_value=float(2 * t.sf(abs(effect) * math.sqrt(n), n - 1)),
        effect_size=effect,
    )


def holm(p_values: Iterable[float]) -> list[float]:
    """Adjust p-values for their number.

    With the adjusted values below 0.05 called findings, the chance of any false one is 5 %.

    Args:
        p_values: In any order; nan, which is no test, stays nan and does not count.

    Returns:
        The adjusted ones, in the same order (Holm, *A simple sequentially rejective multiple test
        procedure*, 1979).

    Raises:
        ValueError: If one is not in [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    found = [math.nan if p != p else scalars.real("p_values", p) for p in p_values]
    for p in found:
        if not (math.isnan(p) or 0 <= p <= 1):
            raise ValueError(f"`p_values` should be in [0, 1]. Found {p}.")
    order = sorted((i for i, p in enumerate(found) if not math.isnan(p)), key=found.__getitem__)
    reached = 0.0
    for rank, i in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * found[i]))
        found[i] = reached
    return found


def seeds_needed(difference: float, std: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """How many seeds the paired t-test needs to find a difference.

    Args:
        difference: The true mean difference.
        std: The standard deviation of the differences between pairs: `statistics.stdev` of a
            pilot's.
        power: The chance to find it, in (0, 1).
        alpha: The p-value below which it counts as found, in (0, 1).

    Returns:
        The least number of pairs, at least 2, by the noncentral t distribution (Cohen 1988).

    Raises:
        ValueError: If `difference` is 0, or next to nothing beside `std`, or a value is out of
            range.
        ImportError: If SciPy is not installed.

    Example:
        >>> seeds_needed(0.005, std=0.01)
        34
    """
    power, alpha = _share("power", power), _share("alpha", alpha)
    difference = scalars.real("difference", difference, "finite and not 0")
    std = scalars.real("std", std, "finite and not negative")
    if not (math.isfinite(difference) and difference != 0):
        raise ValueError(f"`difference` should be finite and not 0. Found {difference}.")
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"`std` should be finite and not negative. Found {std}.")
    if std == 0:
        return 2
    effect = min(abs(difference) / std, 1e100)  # its square is a float still
    if effect < 1e-100:
        raise ValueError(
            f"`difference` should be at least 1e-100 of `std`. Found {difference} and {std}; no "
            f"number of seeds finds so little."
        )
    t, nct, chi2 = _distributions().t, _distributions().nct, _distributions().chi2
    normal = NormalDist()
    z = -normal.inv_cdf(alpha / 2)
    # Below 0 where chance alone finds it so often: the search then ends at 2.
    roughly = (max(0.0, z + normal.inv_cdf(power)) / effect) ** 2
    if roughly > 1e6:
        # More digits than the search can tell apart. What the t-test needs beyond the normal one
        # is Guenther's (Sample size formulas for normal theory T tests, 1981), right to 1 / n.
        return math.ceil(roughly + z**2 / 2)

    def enough(n: int) -> bool:
        shift, critical = effect * math.sqrt(n), t.isf(alpha / 2, n - 1)
        if shift > 1e3:
            # SciPy's is wrong or nan from about 1e5. The normal part no longer counts here: all
            # hangs on the estimated spread.
            return chi2.cdf((n - 1) * (shift / critical) ** 2, n - 1) >= power
        with np.errstate(divide="ignore", invalid="ignore"):  # SciPy 1.12 warns, and is right
            return nct.sf(critical, n - 1, shift) >= power

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def compare(
    records: Iterable[Record],
    *,
    against: str = "baseline",
    measure: Measure = "finetuned_accuracy",
    confidence: float = 0.95,
) -> list[Comparison]:
    """Every cell of a grid against its reference, paired by seed.

    The reference of a cell was asked for alike in every setting but the mode. A baseline, which was
    trained on everything, also serves cells of any share and number of steps; and where the
    reference needs no step 1, those that were scored otherwise. Only seeds that both have count; a
    cell that shares none with its reference is left out. Of two baselines of one seed, which differ
    in nothing that matters to it, the first counts. An accuracy that is nan counts for no seed.

    Where the size of the test set is known, no difference is taken to be known better than to one
    test image: that much is added to the spread over seeds, as a variance. Otherwise equal
    differences are no finding: see :func:`paired`. The p-values are adjusted for the
    rows of this call; :func:`drophot.report.differences` adjusts for those against the baseline and
    against random together, as they stand in one table.

    Args:
        records: The runs.
        against: The mode of the reference: any that is in the records, such as `"baseline"`,
            `"random"`, and for modes that choose while they train `"fresh_subset"`.
        measure: Which accuracy: `"trained_accuracy"`, `"pruned_accuracy"` or
            `"finetuned_accuracy"`, each of the last epoch.
        confidence: Of the intervals, in (0, 1).

    Returns:
        A row for each cell, in the order of the records; `pandas.DataFrame(rows)` gives a table.

    Raises:
        TypeError: If a record is none.
        ValueError: If there are no records, none is of the reference, a cell has two different
            records of one seed, or there is no such measure.
        ImportError: If SciPy is not installed.

    Example:
        >>> same = dict(model="lenet", prune_ratio=0.8, sparsity=0.8, finetune_curve=())
        >>> same |= dict(trained_accuracy=0.97, pruned_accuracy=0.6, fingerprint="")
        >>> same |= dict(seconds={}, device="cpu", versions={})
        >>> share = {"baseline": 1.0, "high": 0.1}
        >>> runs = [
        ...     Record(**same, mode=m, keep_ratio=share[m], kept=6, seed=seed, finetuned_accuracy=a)
        ...     for m, pair in {"baseline": (0.98, 0.99), "high": (0.96, 0.98)}.items()
        ...     for seed, a in enumerate(pair)
        ... ]
        >>> for row in compare(runs):
        ...     print(f"{row.mode}: {row.difference:+.3f}, p = {row.p_holm:.2f}")
        high: -0.015, p = 0.20
    """
    if measure not in get_args(Measure):
        raise ValueError(
            f"`measure` should be one of {', '.join(get_args(Measure))}. Found {measure!r}."
        )
    confidence = _share("confidence", confidence)
    rows = [
        (runs[0][0], _of_pairs(runs, measure, confidence)) for runs in cells.pairs(records, against)
    ]
    adjusted = holm(found.p_value for _, found in rows)
    return [
        Comparison(
            **{name: getattr(first, name) for name in cells.FIELDS},
            against=against,
            measure=measure,
            n=found.n,
            difference=found.difference,
            interval=found.interval,
            p_value=found.p_value,
            p_holm=p_holm,
            effect_size=found.effect_size,
            settings=cells.known(first),
        )
        for (first, found), p_holm in zip(rows, adjusted, strict=True)
    ]


def _of_pairs(
    pairs: Sequence[tuple[Record, Record]], measure: Measure, confidence: float
) -> Paired:
    """The comparison of runs with their references, of those that have the accuracy."""
    found = [(getattr(run, measure), getattr(reference, measure)) for run, reference in pairs]
    found = [pair for pair in found if all(map(math.isfinite, pair))]
    if not found:
        nan = math.nan
        return Paired(n=0, difference=nan, interval=(nan, nan), p_value=nan, effect_size=nan)
    sizes = {record.test_samples for pair in pairs for record in pair}
    left, right = zip(*found, strict=True)
    return _paired(left, right, confidence, step=1 / min(sizes) if min(sizes) > 0 else 0.0)


def _check(name: str, values: Iterable[float]) -> Sequence[float]:
    found = [scalars.real(name, value, "finite") for value in values]
    if not found:
        raise ValueError(f"`{name}` must have at least one value, but it is empty.")
    for value in found:
        if not math.isfinite(value):
            raise ValueError(f"`{name}` should be finite. Found {value}.")
    return found


def _share(name: str, value: Any) -> float:
    found = scalars.real(name, value, "in (0, 1)")
    if not 0 < found < 1:
        raise ValueError(f"`{name}` should be in (0, 1). Found {found}.")
    return found


def _distributions() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('Statistics come from SciPy: pip install "drophot[stats]"') from error
    return stats
