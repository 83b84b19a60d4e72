"""Records as tables, as figures and as a page.

A group is the runs that differ in the seed alone. Accuracies are those after the last epoch, never
after the best one.

Example:
    >>> from drophot.records import Record
    >>> same = dict(model="lenet", seed=0, prune_ratio=0.8, sparsity=0.8, finetune_curve=())
    >>> same |= dict(trained_accuracy=0.97, pruned_accuracy=0.6, fingerprint="")
    >>> same |= dict(seconds={}, device="cpu", versions={})
    >>> all_of_them = dict(mode="baseline", keep_ratio=1.0, kept=60_000, finetuned_accuracy=0.98)
    >>> a_tenth = dict(mode="high", keep_ratio=0.1, kept=6_000, finetuned_accuracy=0.9725)
    >>> runs = [Record(**same, **coreset) for coreset in (all_of_them, a_tenth)]
    >>> print(differences(runs, format="text"))
    share  removed    n  high − base
    -----  -------  ---  -----------
      10%      80%    1        −0.75
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from drophot import _html, _tables, stats
from drophot._panels import Panels
from drophot._store import write_whole
from drophot._tables import EXTRAS, STEPS
from drophot.records import Record
from drophot.stats import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Format = Literal["text", "markdown", "csv"]
Ratio = Literal["keep_ratio", "prune_ratio"]

# Okabe and Ito's colours for all kinds of colour vision, and markers and line styles besides, so
# that a figure reads without its colours. The first four are those of the paper's modes.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000"]
_COLOURS += ["#56B4E9", "#E69F00", "#CC79A7", "#999999"]
_LOOKS = [
    (marker, ("-", "--", ":", "-.")[number % 4], _COLOURS[number % 8])
    for number, marker in enumerate("os^DvPX*<>phd|_1")
]
_MODES = ("low", "high", "random", "baseline")

Looks = dict[str, tuple[str, str, str]]


def table(records: Iterable[Record], format: Format = "markdown") -> str:
    """Accuracies before and after pruning and after fine-tuning, in %, with mean and spread.

    A row for each group: the mean over seeds, with the standard deviation where there are several,
    and `n`, their number. The protocol, the steps ("equal" in number to those on everything), the
    weights ("new" ones after pruning), where they start, BatchNorm, schedule and scope have columns
    where records differ in them.

    Args:
        records: The runs.
        format: "markdown"; "text", without bars; or "csv", in which every number has a column of
            its own, unrounded and in [0, 1], and all columns are always there.

    Returns:
        The table, without a line's end after it.

    Raises:
        ValueError: If there are no records, or no such format.
    """
    _check("format", format, Format)
    groups = _tables.groups(records)
    if format == "csv":
        return _tables.accuracies_csv(groups)
    return _tables.accuracies(groups).text(bars=format == "markdown")


def differences(
    records: Iterable[Record],
    measure: Measure = "finetuned_accuracy",
    format: Format = "markdown",
) -> str:
    """What coresets gain or lose, in percentage points: the paper's Table 1, with intervals.

    A row for each data ratio and prune ratio; columns for each mode less the baseline and for each
    less random, as far as they are there. A difference is the mean over `n` seeds, with
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
    runs = [record for group in _tables.groups(records) for record in group]
    found = _tables.comparisons(runs, measure)
    if not found:
        modes = ", ".join(sorted({record.mode for record in runs}))
        raise ValueError(
            f"`records` should hold a baseline or random subsets, and coresets to compare with "
            f"them. Found {modes}; add the records of the others."
        )
    if format == "csv":
        return _tables.against_csv(found)
    return _tables.against(found).text(bars=format == "markdown")


def plot_curves(records: Iterable[Record], *, ax: Axes | None = None) -> Axes:
    """Draw test accuracy over the epochs of fine-tuning: the paper's Figure 1.

    A line for each group, the mean over seeds, in a band that is its 95 % interval. Epoch 0 is
    right after pruning; where fine-tuning began from new weights, the line begins at epoch 1.

    Args:
        records: The runs, of one data ratio and prune ratio or few.
        ax: Where to draw; `None` makes a new figure.

    Returns:
        The axes, not shown and not saved.

    Raises:
        ValueError: If there are no records, too many groups to tell apart, or runs of different
            lengths in a group.
        ImportError: If matplotlib is not installed, or there are several seeds and no SciPy.
    """
    return _curves(records, ax=ax, looks={})


def _curves(records: Iterable[Record], *, ax: Axes | None, looks: Looks) -> Axes:
    groups = _tables.groups(records)
    if len(groups) > len(_LOOKS):
        raise ValueError(
            f"`records` should be of {len(_LOOKS)} groups at most. Found {len(groups)}; keep those "
            f"of one data ratio and one prune ratio, with the baseline."
        )
    ax = _axes(ax)
    for group, label, (marker, style, colour) in _labelled(groups, looks):
        epochs = {len(record.finetune_curve) for record in group}
        if len(epochs) > 1:
            raise ValueError(
                f"`records` should be of equally many epochs in each group. Found {sorted(epochs)} "
                f"in {label}; draw them apart."
            )
        first = int(group[0].reinitialized or group[0].rewound)
        curves = [(r.pruned_accuracy, *r.finetune_curve)[first:] for r in group]
        x = range(first, first + len(curves[0]))
        y, low, high = _intervals(zip(*curves, strict=True))
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, y, label=label, marker=marker, linestyle=style, color=colour)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("epochs of fine-tuning")
    return _finished(ax)


def plot_steps(records: Iterable[Record], *, ax: Axes | None = None) -> Axes:
    """Draw test accuracy before pruning, after pruning and after fine-tuning: Figure 2.

    A line for each group: the mean, with the standard deviation as a bar where there are several
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
    return _steps(records, ax=ax, looks={})


def _steps(records: Iterable[Record], *, ax: Axes | None, looks: Looks) -> Axes:
    groups = _tables.groups(records)
    ax = _axes(ax)
    middle = (len(groups) - 1) / 2
    for number, (group, label, look) in enumerate(_labelled(groups, looks)):
        marker, style, colour = look
        values = [[100 * getattr(record, step) for record in group] for step in STEPS]
        ax.errorbar(
            [step + 0.06 * (number - middle) for step in range(len(STEPS))],
            [mean(value) for value in values],
            yerr=[stdev(value) if len(value) > 1 else 0 for value in values],
            label=label,
            marker=marker,
            linestyle=style,
            color=colour,
            capsize=3 if len(group) > 1 else 0,
        )
    ax.set_xticks(range(len(STEPS)), list(STEPS.values()))
    return _finished(ax)


def plot_ratios(
    records: Iterable[Record],
    *,
    x: Ratio = "keep_ratio",
    measure: Measure = "finetuned_accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Draw test accuracy against the share of data kept, or of weights removed.

    A line for each mode, with 95 % intervals over seeds; against the share of data the baseline,
    which keeps all of it, is a level line in a band.

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
    return _ratios(records, x=x, measure=measure, ax=ax, looks={})


def _ratios(
    records: Iterable[Record],
    *,
    measure: Measure,
    ax: Axes | None,
    looks: Looks,
    x: Ratio = "keep_ratio",
) -> Axes:
    groups = sorted(_tables.groups(records), key=lambda group: getattr(group[0], x))
    coresets = [group for group in groups if group[0].mode != "baseline"]
    for name in ({"keep_ratio": "prune_ratio", "prune_ratio": "keep_ratio"}[x], *EXTRAS):
        # The baseline is of every data ratio's figure, and its steps are as many as equal ones.
        compared = coresets if name in ("keep_ratio", "equal_steps") else groups
        if len(values := {getattr(group[0], name): None for group in compared}) > 1:
            raise ValueError(
                f"`records` should have one {name}. Found {', '.join(map(repr, values))}; keep "
                f"those of one of them, or draw one axes for each."
            )
    ax = _axes(ax)
    modes = _looks(group[0].mode for group in groups)
    looks = modes | looks
    ends = [100 * getattr(group[0], x) for group in (coresets or groups)]
    # Beside one another, since intervals on top of one another cannot be told apart.
    step = 0.012 * (max(ends) - min(ends))
    for number, mode in enumerate(modes):
        line = [group for group in groups if group[0].mode == mode]
        y, low, high = _intervals([getattr(r, measure) for r in group] for group in line)
        marker, style, colour = looks[mode]
        if mode == "baseline" and x == "keep_ratio":
            ax.axhspan(low[0], high[0], color=colour, alpha=0.1, linewidth=0)
            ax.axhline(y[0], label=mode, linestyle=style, color=colour)
            continue
        ax.errorbar(
            [100 * getattr(g[0], x) + step * (number - (len(modes) - 1) / 2) for g in line],
            y,
            yerr=np.abs(np.subtract([low, high], y)),
            label=mode,
            marker=marker,
            linestyle=style,
            color=colour,
            capsize=0 if low == high else 3,
        )
    ax.set_xticks(sorted(set(ends)))
    ax.set_xlabel({"keep_ratio": "data kept (%)", "prune_ratio": "weights removed (%)"}[x])
    return _finished(ax)


def html(source: Iterable[Record] | Path | str, path: Path | str) -> Path:
    """Write a page of everything: differences, figures, accuracies, seconds, and how to read them.

    One file with nothing outside it, for screens of any width, light or dark, and for paper. What
    the records do not allow is left out, and the page says why. Of several records of one cell the
    last counts.

    Args:
        source: The runs, or the folder of a grid, which may still be running: see
            :meth:`drophot.Grid.run`.
        path: Where to write the page, whole or not at all; folders are made.

    Returns:
        The path.

    Raises:
        ValueError: If there are no records, or `path` is a folder.
        ImportError: If matplotlib is not installed, or there are several seeds and no SciPy.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"`path` should be a file. Found the folder {path}; add the page's name.")
    _axes(None)  # without matplotlib nothing is begun
    found = _html.load(source)
    compared = _tables.comparisons(found.records, "finetuned_accuracy")
    looks = _looks(record.mode for record in found.records)
    page = _html.page(
        found,
        accuracies=_tables.accuracies(_tables.groups(found.records)),
        differences=_tables.against(compared) if compared else None,
        panels=Panels(
            looks=looks,
            plot_ratios=partial(_ratios, measure="finetuned_accuracy", looks=looks),
            plot_curves=partial(_curves, looks=looks),
            plot_steps=partial(_steps, looks=looks),
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    return path


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures come from matplotlib: pip install "drophot[plot]"') from error
    return Figure(layout="constrained").subplots()


def _finished(ax: Axes) -> Axes:
    ax.set_ylabel("test accuracy (%)")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _looks(modes: Iterable[str]) -> Looks:
    """How each mode looks: the paper's always the same, others as they come."""
    found = list(dict.fromkeys(modes))
    others = [mode for mode in found if mode not in _MODES]
    order = [*(mode for mode in _MODES if mode in found), *others]
    places = dict(zip((*_MODES, *others), itertools.cycle(_LOOKS), strict=False))
    return {mode: places[mode] for mode in order}


def _labelled(
    groups: Sequence[Sequence[Record]],
    looks: Looks,
) -> Iterable[tuple[Sequence[Record], str, tuple[str, str, str]]]:
    """Each group with its label and look, its mode's look where that tells the groups apart."""
    modes = [group[0].mode for group in groups]
    found = [_LOOKS[number % len(_LOOKS)] for number in range(len(groups))]
    if len(set(modes)) == len(modes):
        looks = _looks(modes) | looks
        found = [looks[mode] for mode in modes]
    return zip(groups, _labels(groups), found, strict=True)


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """What each group is: always its model, mode, share and n, and all that tells it apart."""
    firsts = [group[0] for group in groups]
    extras = [name for name in _tables.differing(firsts) if name != "model"]
    removed = len({first.prune_ratio for first in firsts}) > 1
    return [
        ", ".join(
            [f"{first.model}: {first.mode}"]
            + [f"{_tables.percent(first.keep_ratio)} kept"] * (first.mode != "baseline")
            + [f"{_tables.percent(first.prune_ratio)} removed"] * removed
            + [f"{EXTRAS[name][0]} {_tables.word(first, name)}" for name in extras]
            + [f"{len(group)} seeds"] * (len(group) > 1)
        )
        for first, group in zip(firsts, groups, strict=True)
    ]


def _intervals(samples: Iterable[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Of each sample the mean and its 95 % interval's ends, in %; all three are one of one."""
    found = [
        (mean(v), *(stats.estimate(v).interval if len(v) > 1 else (v[0], v[0]))) for v in samples
    ]
    middle, low, high = ([100 * value for value in values] for values in zip(*found, strict=True))
    return middle, low, high


def _check(name: str, value: object, kind: Any) -> None:
    if value not in (known := get_args(kind)):
        raise ValueError(f"`{name}` should be {' or '.join(map(repr, known))}. Found {value!r}.")
