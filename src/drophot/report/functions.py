"""The public functions: tables, figures and a page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from drophot._core.atomic_write import atomic_write
from drophot._core.mode_names import BASELINE
from drophot.records.cells import group_by_cell
from drophot.records.pairs import mode_name
from drophot.records.record import Record
from drophot.report import coreset_agreement, html_page, plots, tables
from drophot.report.plots import Ratio
from drophot.report.svg_panels import Panels
from drophot.settings.names import Mode
from drophot.stats import Forgotten, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Format = Literal["text", "markdown", "csv"]


def table(records: Iterable[Record], format: Format = "markdown") -> str:
    """Format the accuracies before and after pruning and after fine-tuning, in %.

    There is a row for each cell, with the mean over seeds, the standard deviation if there are
    several seeds, and `n`, the number of seeds. Every setting in which the records differ has a
    column: the protocol, the number of steps ("equal" to that of training on everything), the
    weights ("new" after pruning), the epochs, the optimizer and all others. Values that are too
    long to read, such as the digest of the data, are shown by 8 digits of their fingerprint, and
    long values that differ together share a column. A missing accuracy (nan) is shown as "–", and
    a mean of fewer than `n` runs shows their number.

    Args:
        records: The runs.
        format: "markdown"; "text", without bars; or "csv", with a column for each number, unrounded
            and in [0, 1]. A CSV table always has the columns of settings that are fields of a
            record.

    Returns:
        The table, without a newline at its end.

    Raises:
        TypeError: If an item of `records` is not a record.
        ValueError: If there are no records, two different records have the same cell and seed, or
            `format` is unknown.
    """
    _check("format", format, Format)
    groups = group_by_cell(records)
    if format == "csv":
        return tables.accuracies_csv(groups)
    return tables.accuracies(groups).text(bars=format == "markdown")


def differences(
    records: Iterable[Record],
    measure: Measure = "finetuned_accuracy",
    format: Format = "markdown",
    *,
    against: str | Mode | None = None,
) -> str:
    """Format the differences in accuracy to a reference, in percentage points.

    This is the paper's Table 1 with confidence intervals. There is a row for each data ratio and
    prune ratio, and a column for each mode and reference. If these are more columns than the
    paper's five, each mode has a row. A difference is the mean over `n` seeds, with its 95 %
    interval in brackets and `*` if p < 0.05 after Holm's correction for all differences in the
    table (see :func:`drophot.stats.compare`). A single seed gives neither.

    Args:
        records: The runs.
        measure: The accuracy to compare.
        format: "markdown"; "text", without bars; or "csv", with one row for each difference that
            holds all of its numbers, unrounded and in [-1, 1].
        against: The mode of the reference: the name of any mode in the records, or the mode itself.
            `None` compares with the baseline and with random, as far as the records have them.

    Returns:
        The table, without a newline at its end.

    Raises:
        TypeError: If an item of `records` is not a record, or `against` is not a mode.
        ValueError: If there is nothing to compare, no record has the mode `against`, two different
            records have the same cell and seed, or `measure` or `format` is unknown.
        ImportError: If there are several seeds and SciPy is not installed.
    """
    _check("measure", measure, Measure)
    _check("format", format, Format)
    runs = [record for group in group_by_cell(records) for record in group]
    found = tables.comparisons(runs, measure, against)
    if not found:
        raise ValueError(_nothing_to_compare(runs, against))
    if format == "csv":
        return tables.against_csv(found)
    return tables.against(found).text(bars=format == "markdown")


def _nothing_to_compare(runs: Iterable[Record], against: str | Mode | None) -> str:
    """Why there is no difference to show: modes are missing, or runs that belong together."""
    seeds: dict[str, set[int]] = {}
    for record in runs:
        seeds.setdefault(record.mode, set()).add(record.seed)
    chosen = (BASELINE, "random") if against is None else (mode_name(against),)
    reference = " or ".join(chosen)
    references = [mode for mode in seeds if mode in chosen]
    others = [mode for mode in seeds if mode not in (*chosen, BASELINE)]
    if references and (others or len(references) == 2):
        listed = "; ".join(
            f"{mode} with seed {', '.join(map(str, sorted(found)))}"
            for mode, found in seeds.items()
        )
        return (
            f"`records` must hold coresets that share a seed and all settings with a reference "
            f"({reference}), got {listed}. Run both with the same seeds and settings."
        )
    return (
        f"`records` must hold a reference ({reference}) and coresets to compare with it, got only "
        f"{', '.join(seeds)}. Add the records of the others."
    )


def agreement(records: Iterable[Record], format: Format = "markdown") -> str:
    """Format how much coresets agree, over seeds and between modes.

    There is a row for each mode and data ratio. The column "over seeds" is the agreement of the
    coresets of its `n` seeds with its 95 % interval: 1 if all are equal, 0 on average if they are
    random. With few seeds the interval is too narrow (see :func:`drophot.stats.stability`). The
    other columns are the agreement with another mode for the same seed, the mean over seeds.
    Coresets that cells share, for example those of several prune ratios, count once.

    Args:
        records: The runs. Left out are those that do not hold their coreset: older ones, those of
            modes that reselect samples, and baselines.
        format: "markdown"; "text", without bars; or "csv", with one row for each number, unrounded.

    Returns:
        The table, without a newline at its end.

    Raises:
        TypeError: If an item of `records` is not a record.
        ValueError: If there are not two coresets to compare, two different records have the same
            cell and seed, or `format` is unknown.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from drophot import DropHot
        >>> from drophot.models import fcnet
        >>> data = TensorDataset(torch.eye(40), torch.arange(40) % 2)
        >>> model = partial(fcnet, in_features=40, hidden=4, num_classes=2)
        >>> settings = dict(data_ratio=0.5, mode="random", prune_ratio=0.5)
        >>> runs = [DropHot(model, data, data, **settings, seed=seed) for seed in range(2)]
        >>> print(agreement([run.run() for run in runs], format="text"))
        kept    share    n  over seeds
        ------  -----  ---  ----------
        random    50%    2        0.10
    """
    _check("format", format, Format)
    runs = [record for group in group_by_cell(records) for record in group]
    found = coreset_agreement.coresets_of(runs)
    if not coreset_agreement.has_agreement(found):
        held = sum(bool(run.coreset) for run in runs)
        raise ValueError(
            f"`records` must hold coresets of several seeds or modes with the same settings, got "
            f"{held} of {len(runs)} records with a coreset. Run more seeds or modes."
        )
    if format == "csv":
        return coreset_agreement.csv(found)
    return coreset_agreement.table(found).text(bars=format == "markdown")


def plot_curves(records: Iterable[Record], *, ax: Axes | None = None) -> Axes:
    """Plot test accuracy over the epochs of fine-tuning: the paper's Figure 1.

    Each cell is a line, the mean over seeds, with its 95 % confidence interval as a band. Epoch 0
    is right after pruning. If fine-tuning started from other weights, the line starts at epoch 1.

    Args:
        records: The runs, of one or few data ratios and prune ratios.
        ax: The axes to draw into. `None` creates a new figure.

    Returns:
        The axes, neither shown nor saved.

    Raises:
        TypeError: If an item of `records` is not a record.
        ValueError: If there are no records, more cells than can be told apart, or two different
            records of the same cell and seed.
        ImportError: If matplotlib is not installed, or there are several seeds and SciPy is not.
    """
    return plots.curves(records, ax=ax)


def plot_steps(records: Iterable[Record], *, ax: Axes | None = None) -> Axes:
    """Plot test accuracy before pruning, after pruning and after fine-tuning: Figure 2.

    Each cell is a line, the mean over seeds, with the standard deviation as bars if there are
    several seeds.

    Args:
        records: The runs.
        ax: The axes to draw into. `None` creates a new figure.

    Returns:
        The axes, neither shown nor saved.

    Raises:
        TypeError: If an item of `records` is not a record.
        ValueError: If there are no records, or two different records of the same cell and seed.
        ImportError: If matplotlib is not installed.
    """
    return plots.steps(records, ax=ax)


def plot_ratios(
    records: Iterable[Record],
    *,
    x: Ratio = "keep_ratio",
    measure: Measure = "finetuned_accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Plot test accuracy against the share of data kept or the share of weights removed.

    Each mode is a line with 95 % confidence intervals over seeds. Against the share of data, the
    baseline, which keeps all of it, is a horizontal line with a band. Shares of data that span a
    factor of 20 or more are on a logarithmic scale.

    Args:
        records: The runs, of one model and protocol, with a single value of the ratio that is not
            `x`.
        x: "keep_ratio" or "prune_ratio".
        measure: The accuracy to plot.
        ax: The axes to draw into. `None` creates a new figure.

    Returns:
        The axes, neither shown nor saved.

    Raises:
        TypeError: If an item of `records` is not a record.
        ValueError: If there are no records, two different records have the same cell and seed, the
            records differ in a setting that the figure does not show, or `x` or `measure` is
            unknown.
        ImportError: If matplotlib is not installed, or there are several seeds and SciPy is not.
    """
    _check("x", x, Ratio)
    _check("measure", measure, Measure)
    return plots.ratios(records, x=x, measure=measure, ax=ax)


def plot_forgotten(found: Forgotten, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Plot the share of samples that a pruned network forgets against their score.

    Each point is a group of samples with similar scores that were correct before pruning, with the
    95 % interval of the share that is wrong after it. Draw several prune ratios into the same axes
    to compare them.

    Args:
        found: The result of :func:`drophot.stats.forgotten_by_pruning`.
        label: The label of the line in the legend. `None` adds no legend.
        ax: The axes to draw into. `None` creates a new figure.

    Returns:
        The axes, neither shown nor saved.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> from drophot.stats import forgotten_by_pruning
        >>> before, after, scores = [True] * 4, [True, True, True, False], [0, 1, 4, 9]
        >>> ax = plot_forgotten(forgotten_by_pruning(before, after, scores, groups=2))
        >>> ax.get_ylabel()
        'correct before, wrong after (%)'
    """
    return plots.forgotten(found, ax=ax, label=label)


def html(source: Iterable[Record] | Path | str, path: Path | str) -> Path:
    """Write an HTML page with the differences, figures, accuracies, seconds and explanations.

    The page is a single file that loads nothing else, for screens of any width, light or dark, and
    for print. Parts that the records do not allow are left out, and the page says why.

    Args:
        source: The runs, or the folder of a grid, which may still be running: see
            :meth:`drophot.Grid.run`.
        path: The file to write, whole or not at all. Missing folders are created.

    Returns:
        The path.

    Raises:
        TypeError: If the arguments are swapped, or an item of `source` is not a record.
        ValueError: If there are no records, two different records have the same cell and seed, or
            `path` is a folder.
        ImportError: If matplotlib is not installed, or there are several seeds and SciPy is not.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(
            f"`path` must be the file to write, got {type(path).__name__}. The records come first: "
            f'html(records, "report.html").'
        )
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"`path` must be a file, got the folder {path}. Add a file name to it.")
    plots.axes(None)  # raises before any work if matplotlib is missing
    found = html_page.load(source)
    compared = tables.comparisons(found.records, "finetuned_accuracy")
    coresets = coreset_agreement.coresets_of(found.records)
    agreeing = coreset_agreement.has_agreement(coresets)
    page = html_page.page(
        found,
        accuracies=tables.accuracies(group_by_cell(found.records)),
        differences=tables.against(compared) if compared else None,
        agreement=coreset_agreement.table(coresets) if agreeing else None,
        panels=Panels(record.mode for record in found.records),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def _check(name: str, value: object, kind: Any) -> None:
    if value not in (known := get_args(kind)):
        raise ValueError(f"`{name}` must be {' or '.join(map(repr, known))}, got {value!r}.")
