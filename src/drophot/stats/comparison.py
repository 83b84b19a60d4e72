"""Every cell of a grid compared with its reference, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from drophot.records.cells import CELL_FIELDS, known_settings
from drophot.records.pairs import mode_name, pairs
from drophot.records.record import Record
from drophot.settings.names import Mode
from drophot.stats.paired_tests import Paired, check_share, holm, paired_t_test

Measure = Literal["trained_accuracy", "pruned_accuracy", "finetuned_accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A cell of a grid compared with its reference, paired by seed. Accuracies are in [0, 1].

    The fields from `model` to `importance` have the same meaning as in :class:`drophot.Record`.
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
    importance: str
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
    confidence = check_share("confidence", confidence)
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
    return paired_t_test(left, right, confidence, step=1 / min(sizes) if min(sizes) > 0 else 0.0)
