"""Records drawn into axes: a look for each mode, and what the three figures show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from drophot import cells, stats
from drophot.records import Record
from drophot.report import setting_columns
from drophot.report.setting_columns import EXTRAS
from drophot.report.tables import STEPS, average, deviation, finite, percent
from drophot.stats import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Ratio = Literal["keep_ratio", "prune_ratio"]
Looks = Mapping[str, tuple[str, Any, str]]
"""Marker, line style and colour of each mode."""

# Okabe and Ito's colours for all kinds of colour vision, and markers and line styles besides, so
# that a figure reads without its colours. The first four are those of the paper's modes.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000"]
_COLOURS += ["#56B4E9", "#E69F00", "#CC79A7", "#999999"]
_LOOKS = [
    (marker, ("-", "--", ":", "-.")[(number + number // 8) % 4], _COLOURS[number % 8])
    for number, marker in enumerate("os^DvPX*<>phd|_1")
]
MOST = len(_LOOKS)
"""How many lines can be told apart."""
_MODES = ("low", "high", "random", "baseline")


def curves(
    records: Iterable[Record], *, ax: Axes | None = None, looks: Looks | None = None
) -> Axes:
    """Draw accuracy over the epochs of fine-tuning: :func:`drophot.report.plot_curves`.

    Args:
        records: The runs.
        ax: Where to draw.
        looks: Of the modes, where others than those here are drawn beside them.

    Returns:
        The axes.

    Raises:
        ValueError: If there are too many groups.
    """
    groups = cells.cells(records)
    if len(groups) > MOST:
        raise ValueError(
            f"`records` should be of {MOST} groups at most. Found {len(groups)}; keep those "
            f"of one data ratio and one prune ratio, with the baseline."
        )
    ax = axes(ax)
    for group, label, (marker, style, colour) in _labelled(groups, looks):
        first = int(group[0].reinitialized or group[0].rewound)
        curves = [(r.pruned_accuracy, *r.finetune_curve)[first:] for r in group]
        y, low, high = _intervals(zip(*curves, strict=True))
        x = range(first, first + len(y))
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, y, label=label, marker=marker, linestyle=style, color=colour)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("epochs of fine-tuning")
    return _finished(ax)


def steps(records: Iterable[Record], *, ax: Axes | None = None, looks: Looks | None = None) -> Axes:
    """Draw accuracy before and after pruning and after fine-tuning: `report.plot_steps`.

    Args:
        records: The runs.
        ax: Where to draw.
        looks: Of the modes, where others than those here are drawn beside them.

    Returns:
        The axes.
    """
    groups = cells.cells(records)
    ax = axes(ax)
    middle = (len(groups) - 1) / 2
    for number, (group, label, look) in enumerate(_labelled(groups, looks)):
        marker, style, colour = look
        values = [[100 * getattr(record, step) for record in group] for step in STEPS]
        ax.errorbar(
            [step + 0.06 * (number - middle) for step in range(len(STEPS))],
            [average(value) for value in values],
            yerr=[0 if math.isnan(spread := deviation(value)) else spread for value in values],
            label=label,
            marker=marker,
            linestyle=style,
            color=colour,
            capsize=3 if len(group) > 1 else 0,
        )
    ax.set_xticks(range(len(STEPS)), list(STEPS.values()))
    return _finished(ax)


def ratios(
    records: Iterable[Record],
    *,
    x: Ratio = "keep_ratio",
    measure: Measure = "finetuned_accuracy",
    ax: Axes | None = None,
    looks: Looks | None = None,
) -> Axes:
    """Draw accuracy against a ratio: :func:`drophot.report.plot_ratios`.

    Args:
        records: The runs.
        x: Which ratio.
        measure: Which accuracy.
        ax: Where to draw.
        looks: Of the modes, where others than those here are drawn beside them.

    Returns:
        The axes.

    Raises:
        ValueError: If the runs differ in what the figure does not show.
    """
    groups = sorted(cells.cells(records), key=lambda group: getattr(group[0], x))
    coresets = [group for group in groups if group[0].mode != "baseline"]
    firsts = [group[0] for group in groups]
    more = setting_columns.differing(firsts)
    # The baseline is of every data ratio's figure, its steps are as many as equal ones, and it
    # needs no scores.
    shared = cells.independent_of("baseline")
    for name in ({"keep_ratio": "prune_ratio", "prune_ratio": "keep_ratio"}[x], *EXTRAS, *more):
        found = more[name] if name in more else [getattr(first, name) for first in firsts]
        compared = [
            value
            for first, value in zip(firsts, found, strict=True)
            if not (name in shared and coresets and first.mode == "baseline")
        ]
        if len(values := dict.fromkeys(map(repr, compared))) > 1:
            found = ", ".join(value[:80] for value in values)
            raise ValueError(
                f"`records` should have one {name}. Found {found}; keep those of one "
                f"of them, or draw one axes for each."
            )
    ax = axes(ax)
    modes = looks_of(group[0].mode for group in groups)
    looks = {**modes, **(looks or {})}
    ends = sorted({100 * getattr(group[0], x) for group in (coresets or groups)})
    scale = "log" if x == "keep_ratio" and ends[-1] >= 20 * ends[0] else "linear"
    places = np.log(ends) if scale == "log" else np.array(ends)
    # Beside one another, since intervals on top of one another cannot be told apart.
    step = min([0.012 * np.ptp(places), *(0.7 * np.diff(places) / len(modes))])
    for number, mode in enumerate(modes):
        line = [group for group in groups if group[0].mode == mode]
        y, low, high = _intervals([getattr(r, measure) for r in group] for group in line)
        marker, style, colour = looks[mode]
        if mode == "baseline" and x == "keep_ratio":
            if not math.isnan(y[0]):
                ax.axhspan(low[0], high[0], color=colour, alpha=0.1, linewidth=0)
            ax.axhline(y[0], label=_shown(mode), linestyle=style, color=colour)
            continue
        shift = step * (number - (len(modes) - 1) / 2)
        at = np.array([100 * getattr(group[0], x) for group in line])
        ax.errorbar(
            at * np.exp(shift) if scale == "log" else at + shift,
            y,
            yerr=np.abs(np.subtract([low, high], y)),
            label=_shown(mode),
            marker=marker,
            linestyle=style,
            color=colour,
            capsize=0 if low == high else 3,
        )
    ax.set_xscale(scale)
    ax.minorticks_off()
    ax.set_xticks(ends, [f"{end:.4g}" for end in ends])
    ax.set_xlabel({"keep_ratio": "data kept (%)", "prune_ratio": "weights removed (%)"}[x])
    return _finished(ax)


def axes(ax: Axes | None) -> Axes:
    """The axes, or new ones.

    Args:
        ax: Where to draw, if that is known.

    Returns:
        The axes.

    Raises:
        ImportError: If they are not there, and matplotlib is not either.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures come from matplotlib: pip install "drophot[plot]"') from error
    return Figure(layout="constrained").subplots()


def looks_of(modes: Iterable[str]) -> Looks:
    """How each mode looks: the paper's always the same, others as they come.

    Args:
        modes: Their names.

    Returns:
        Marker, line style and colour of each.
    """
    found = list(dict.fromkeys(modes))
    others = [mode for mode in found if mode not in _MODES]
    order = [*(mode for mode in _MODES if mode in found), *others]
    places = dict(zip((*_MODES, *others), itertools.cycle(_LOOKS), strict=False))
    return {mode: places[mode] for mode in order}


def _finished(ax: Axes) -> Axes:
    ax.set_ylabel("test accuracy (%)")
    ax.ticklabel_format(axis="y", useOffset=False)  # 97.522, never 0.022 and +97.5 in a corner
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _labelled(
    groups: Sequence[Sequence[Record]],
    looks: Looks | None,
) -> Iterable[tuple[Sequence[Record], str, tuple[str, Any, str]]]:
    """Each group with its label and look, its mode's look where that tells the groups apart."""
    modes = [group[0].mode for group in groups]
    found = [_LOOKS[number % len(_LOOKS)] for number in range(len(groups))]
    if len(set(modes)) == len(modes):
        looks = {**looks_of(modes), **(looks or {})}
        found = [looks[mode] for mode in modes]
    return zip(groups, map(_shown, _labels(groups)), found, strict=True)


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """What each group is: always its model, mode, share and n, and all that tells it apart."""
    firsts = [group[0] for group in groups]
    extras = [column for column in setting_columns.columns(firsts) if column.name != "model"]
    removed = len({first.prune_ratio for first in firsts}) > 1
    return [
        ", ".join(
            [f"{first.model}: {first.mode}"]
            + [f"{percent(first.keep_ratio)} kept"] * (first.mode != "baseline")
            + [f"{percent(first.prune_ratio)} removed"] * removed
            + [f"{column.heading} {column.words[number]}" for column in extras]
            + [f"{len(group)} seeds"] * (len(group) > 1)
        )
        for number, (first, group) in enumerate(zip(firsts, groups, strict=True))
    ]


def _shown(label: str) -> str:
    """A label as matplotlib shows it as it is: no formula, and not left out of the legend."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _intervals(samples: Iterable[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Of each sample the mean and its 95 % interval's ends, in %; all three are one of one."""
    found = []
    for sample in samples:
        values = finite(sample)
        ends = stats.estimate(values).interval if len(values) > 1 else (average(values),) * 2
        found.append((average(values), *ends))
    middle, low, high = ([100 * value for value in values] for values in zip(*found, strict=True))
    return middle, low, high
