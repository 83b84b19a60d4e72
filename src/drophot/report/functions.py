"""The public functions: tables, figures and a page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from drophot import cells
from drophot.grid.store import write_whole
from drophot.records import Record
from drophot.report import html_page, plots, tables
from drophot.report.plots import Ratio
from drophot.report.svg_panels import Panels
from drophot.stats import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Format = Literal["text", "markdown", "csv"]


def table(records: Iterable[Record], format: Format = "markdown") -> str:
    """Accuracies before and after pruning and after fine-tuning, in %, with mean and spread.

    A row for each cell: the mean over seeds, with the standard deviation where there are several,
    and `n`, their number. Every setting in which records differ has a column: the protocol, the
    steps ("equal" in number to those on everything), the weights ("new" ones after pruning), the
    epochs, the optimiser and all others. Values too long to read, such as the data's digest, are
    shown by 8 digits of their fingerprint, those that go together in one column. An accuracy that
    is nan, of a run that diverged, is "–"; a mean of fewer runs than `n` says of how many.

    Args:
        records: The runs.
        format: "markdown"; "text", without bars; or "csv", in which every number has a column of
            its own, unrounded and in [0, 1], and all columns are always there.

    Returns:
        The table, without a line's end after it.

    Raises:
        TypeError: If one is no record.
        ValueError: If there are no records, two different ones of one cell and seed, or no such
            format.
    """
    _check("format", format, Format)
    groups = cells.cells(records)
    if format == "csv":
        return tables.accuracies_csv(groups)
    return tables.accuracies(groups).text(bars=format == "markdown")


def differences(
    records: Iterable[Record],
    measure: Measure = "finetuned_accuracy",
    format: Format = "markdown",
) -> str:
    """What coresets gain or lose, in percentage points: the paper's Table 1, with intervals.

    A row for each data ratio and prune ratio; columns for each mode less the baseline and for each
    less random, as far as they are there. Where these are more than the paper's five, each mode has
    a row of its own. A difference is the mean over `n` seeds, with
    its 95 % interval in brackets and `*` where p < 0.05 after Holm's correction for all
    differences in the table (see :func:`drophot.stats.compare`). One seed gives neither.

    Args:
        records: The runs.
        measure: Which accuracy.
        format: "markdown"; "text", without bars; or "csv", in which every difference has a row
            with all of its numbers, unrounded and in [-1, 1].

    Returns:
        The table, without a line's end after it.

    Raises:
        ValueError: If there is nothing to compare, or no such measure or format.
        ImportError: If there are several seeds and SciPy is not installed.
    """
    _check("measure", measure, Measure)
    _check("format", format, Format)
    runs = [record for group in cells.cells(records) for record in group]
    found = tables.comparisons(runs, measure)
    if not found:
        seeds: dict[str, set[int]] = {}
        for record in runs:
            seeds.setdefault(record.mode, set()).add(record.seed)
        references, coresets = (
            [mode for mode in sorted(seeds) if (mode in ("baseline", "random")) is reference]
            for reference in (True, False)
        )
        modes = ", ".join(seeds)
        if references and (coresets or len(references) == 2):
            found_seeds = "; ".join(
                f"{mode} with seed {', '.join(map(str, sorted(seeds[mode])))}" for mode in seeds
            )
            raise ValueError(
                f"`records` should hold coresets that share a seed and all settings with a "
                f"baseline or random subset. Found {found_seeds}; run both with the same seeds "
                f"and settings."
            )
        raise ValueError(
            f"`records` should hold a baseline or random subsets, and coresets to compare with "
            f"them. Found {modes}; add the records of the others."
        )
    if format == "csv":
        return tables.against_csv(found)
    return tables.against(found).text(bars=format == "markdown")


def plot_curves(records: Iterable[Record], *, ax: Axes | None = None) -> Axes:
    """Draw test accuracy over the epochs of fine-tuning: the paper's Figure 1.

    A line for each cell, the mean over seeds, in a band that is its 95 % interval. Epoch 0 is
    right after pruning; where fine-tuning began from new weights, the line begins at epoch 1.

    Args:
        records: The runs, of one data ratio and prune ratio or few.
        ax: Where to draw; `None` makes a new figure.

    Returns:
        The axes, not shown and not saved.

    Raises:
        ValueError: If there are no records, too many cells to tell apart, or two different
            records of one cell and seed.
        ImportError: If matplotlib is not installed, or there are several seeds and no SciPy.
    """
    return plots.curves(records, ax=ax)


def plot_steps(records: Iterable[Record], *, ax: Axes | None = None) -> Axes:
    """Draw test accuracy before pruning, after pruning and after fine-tuning: Figure 2.

    A line for each cell: the mean, with the standard deviation as a bar where there are several
    seeds.

    Args:
        records: The runs.
        ax: Where to draw; `None` makes a new figure.

    Returns:
        The axes, not shown and not saved.

    Raises:
        ValueError: If there are no records.
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
    """Draw test accuracy against the share of data kept, or of weights removed.

    A line for each mode, with 95 % intervals over seeds; against the share of data the baseline,
    which keeps all of it, is a level line in a band. Shares of data from little to much, a factor
    of 20 and more, are on a logarithmic scale.

    Args:
        records: The runs, of one model and protocol, with one value of the ratio that is not `x`.
        x: "keep_ratio" or "prune_ratio".
        measure: Which accuracy.
        ax: Where to draw; `None` makes a new figure.

    Returns:
        The axes, not shown and not saved.

    Raises:
        ValueError: If there are no records, or they differ in what the figure does not show.
        ImportError: If matplotlib is not installed, or there are several seeds and no SciPy.
    """
    _check("x", x, Ratio)
    _check("measure", measure, Measure)
    return plots.ratios(records, x=x, measure=measure, ax=ax)


def html(source: Iterable[Record] | Path | str, path: Path | str) -> Path:
    """Write a page of everything: differences, figures, accuracies, seconds, and how to read them.

    One file with nothing outside it, for screens of any width, light or dark, and for paper. What
    the records do not allow is left out, and the page says why.

    Args:
        source: The runs, or the folder of a grid, which may still be running: see
            :meth:`drophot.Grid.run`.
        path: Where to write the page, whole or not at all; folders are made.

    Returns:
        The path.

    Raises:
        TypeError: If the arguments are swapped, or one of the records is none.
        ValueError: If there are no records, two different ones of one cell and seed, or `path` is a
            folder.
        ImportError: If matplotlib is not installed, or there are several seeds and no SciPy.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(
            f"`path` should be the page's file. Found {type(path).__name__}; the records come "
            f'first: html(records, "report.html").'
        )
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"`path` should be a file. Found the folder {path}; add the page's name.")
    plots.axes(None)  # without matplotlib nothing is begun
    found = html_page.load(source)
    compared = tables.comparisons(found.records, "finetuned_accuracy")
    page = html_page.page(
        found,
        accuracies=tables.accuracies(cells.cells(found.records)),
        differences=tables.against(compared) if compared else None,
        panels=Panels(record.mode for record in found.records),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    return path


def _check(name: str, value: object, kind: Any) -> None:
    if value not in (known := get_args(kind)):
        raise ValueError(f"`{name}` should be {' or '.join(map(repr, known))}. Found {value!r}.")
