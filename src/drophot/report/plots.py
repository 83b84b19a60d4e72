"""The figures, and the style of each mode in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from drophot import stats
from drophot._core.mode_names import BASELINE
from drophot.records.cells import group_by_cell
from drophot.records.pairs import free_settings
from drophot.records.record import Record
from drophot.report import setting_columns
from drophot.report.tables import STEPS, average, deviation, finite, percent
from drophot.stats import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Ratio = Literal["keep_ratio", "prune_ratio"]
Styles = Mapping[str, tuple[str, Any, str]]
"""The marker, line style and color of each mode."""

# Okabe and Ito's colors, which all kinds of color vision can tell apart. Markers and line styles
# differ too, so that a figure reads without color. The first four are those of the paper's modes.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#000000"]
_COLORS += ["#56B4E9", "#E69F00", "#CC79A7", "#999999"]
_STYLES = [
    (marker, ("-", "--", ":", "-.")[(number + number // 8) % 4], _COLORS[number % 8])
    for number, marker in enumerate("os^DvPX*<>phd|_1234")
]
MOST = len(_STYLES)
"""The number of lines that can be told apart."""
_MODES = ("low", "high", "random", BASELINE)

Ends = Callable[[Sequence[float]], tuple[float, float]]
"""The ends of a bar or band for the values of several seeds."""


def confidence_ends(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95 % confidence interval of the mean."""
    return stats.estimate(values).interval


def extreme_ends(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value."""
    return min(values), max(values)


def curves(
    records: Iterable[Record],
    *,
    ax: Axes | None = None,
    styles: Styles | None = None,
    ends: Ends = confidence_ends,
) -> Axes:
    """Draw accuracy over the epochs of fine-tuning: :func:`drophot.report.plot_curves`."""
    groups = group_by_cell(records)
    if len(groups) > MOST:
        raise ValueError(
            f"`records` must have at most {MOST} cells to draw, got {len(groups)}. Keep the "
            f"records of one data ratio and one prune ratio, and the baseline."
        )
    ax = axes(ax)
    for group, label, (marker, style, color) in _labelled(groups, styles):
        first = int(group[0].reinitialized or group[0].rewound)
        curves = [(r.pruned_accuracy, *r.finetune_curve)[first:] for r in group]
        y, low, high = _intervals(zip(*curves, strict=True), ends)
        x = range(first, first + len(y))
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(x, y, label=label, marker=marker, linestyle=style, color=color)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("epochs of fine-tuning")
    return _finished(ax)


def steps(
    records: Iterable[Record], *, ax: Axes | None = None, styles: Styles | None = None
) -> Axes:
    """Draw accuracy before and after pruning and after fine-tuning: `report.plot_steps`."""
    groups = group_by_cell(records)
    ax = axes(ax)
    middle = (len(groups) - 1) / 2
    for number, (group, label, style) in enumerate(_labelled(groups, styles)):
        marker, style, color = style
        values = [[100 * getattr(record, step) for record in group] for step in STEPS]
        ax.errorbar(
            [step + 0.06 * (number - middle) for step in range(len(STEPS))],
            [average(value) for value in values],
            yerr=[0 if math.isnan(spread := deviation(value)) else spread for value in values],
            label=label,
            marker=marker,
            linestyle=style,
            color=color,
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
    styles: Styles | None = None,
    ends: Ends = confidence_ends,
) -> Axes:
    """Draw accuracy against a ratio: :func:`drophot.report.plot_ratios`."""
    groups = sorted(group_by_cell(records), key=lambda group: getattr(group[0], x))
    coresets = [group for group in groups if group[0].mode != BASELINE]
    firsts = [group[0] for group in groups]
    more = setting_columns.differing(firsts)
    # The baseline belongs to the figure of every data ratio, takes the equal number of steps, and
    # needs no scores.
    shared = free_settings(BASELINE)
    for name in (
        {"keep_ratio": "prune_ratio", "prune_ratio": "keep_ratio"}[x],
        *setting_columns.FIELDS,
        *more,
    ):
        found = more[name] if name in more else [getattr(first, name) for first in firsts]
        compared = [
            value
            for first, value in zip(firsts, found, strict=True)
            if not (name in shared and coresets and first.mode == BASELINE)
        ]
        if len(values := dict.fromkeys(map(repr, compared))) > 1:
            found = ", ".join(value[:80] for value in values)
            raise ValueError(
                f"`records` must have a single {name}, got {found}. Keep the records of one "
                f"of them, or draw each into its own axes."
            )
    ax = axes(ax)
    modes = styles_of(group[0].mode for group in groups)
    styles = {**modes, **(styles or {})}
    ticks = sorted({100 * getattr(group[0], x) for group in (coresets or groups)})
    scale = "log" if x == "keep_ratio" and ticks[-1] >= 20 * ticks[0] else "linear"
    positions = np.log(ticks) if scale == "log" else np.array(ticks)
    # Side by side, because overlapping intervals cannot be told apart.
    step = min([0.012 * np.ptp(positions), *(0.7 * np.diff(positions) / len(modes))])
    for number, mode in enumerate(modes):
        line = [group for group in groups if group[0].mode == mode]
        y, low, high = _intervals(([getattr(r, measure) for r in group] for group in line), ends)
        marker, style, color = styles[mode]
        if mode == BASELINE and x == "keep_ratio":
            if not math.isnan(y[0]):
                ax.axhspan(low[0], high[0], color=color, alpha=0.1, linewidth=0)
            ax.axhline(y[0], label=_shown(mode), linestyle=style, color=color)
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
            color=color,
            capsize=0 if low == high else 3,
        )
    ax.set_xscale(scale)
    ax.minorticks_off()
    ax.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    ax.set_xlabel({"keep_ratio": "data kept (%)", "prune_ratio": "weights removed (%)"}[x])
    return _finished(ax)


def forgotten(found: stats.Forgotten, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draw the share forgotten against the score: :func:`drophot.report.plot_forgotten`."""
    ax = axes(ax)
    shares = 100 * found.num_forgotten / found.num_correct
    ends = 100 * found.intervals.T
    bars = np.abs(ends - shares)  # at 0 and 1, rounding may leave the share outside
    lines = sum(1 for one in ax.containers if one.get_label() is not None)
    marker, style, color = _STYLES[lines % MOST]
    ax.errorbar(
        found.scores,
        shares,
        yerr=bars,
        label=label and _shown(label),
        marker=marker,
        linestyle=style,
        color=color,
        capsize=3,
    )
    ax.set_xlabel("score (mean of a group)")
    ax.set_ylabel("correct before, wrong after (%)")
    ax.autoscale(axis="y")  # an earlier line may have fixed the upper end
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", alpha=0.3)
    if label:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def axes(ax: Axes | None) -> Axes:
    """The axes if given, else new ones."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib, which is not installed: pip install "drophot[plot]"'
        ) from error
    return Figure(layout="constrained").subplots()


def styles_of(modes: Iterable[str]) -> Styles:
    """The style of each mode. The paper's modes always have the same; others take the next one."""
    found = list(dict.fromkeys(modes))
    others = [mode for mode in found if mode not in _MODES]
    order = [*(mode for mode in _MODES if mode in found), *others]
    styles = dict(zip((*_MODES, *others), itertools.cycle(_STYLES), strict=False))
    return {mode: styles[mode] for mode in order}


def _finished(ax: Axes) -> Axes:
    ax.set_ylabel("test accuracy (%)")
    ax.ticklabel_format(axis="y", useOffset=False)  # 97.522, not 0.022 with +97.5 in a corner
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _labelled(
    groups: Sequence[Sequence[Record]],
    styles: Styles | None,
) -> Iterable[tuple[Sequence[Record], str, tuple[str, Any, str]]]:
    """Each group with its label and style: that of its mode if all modes differ."""
    modes = [group[0].mode for group in groups]
    found = [_STYLES[number % len(_STYLES)] for number in range(len(groups))]
    if len(set(modes)) == len(modes):
        styles = {**styles_of(modes), **(styles or {})}
        found = [styles[mode] for mode in modes]
    return zip(groups, map(_shown, _labels(groups)), found, strict=True)


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """A label for each group with its model, mode, share and n, and all that tells it apart."""
    firsts = [group[0] for group in groups]
    extras = [column for column in setting_columns.columns(firsts) if column.name != "model"]
    removed = len({first.prune_ratio for first in firsts}) > 1
    return [
        ", ".join(
            [f"{first.model}: {first.mode}"]
            + [f"{percent(first.keep_ratio)} kept"] * (first.mode != BASELINE)
            + [f"{percent(first.prune_ratio)} removed"] * removed
            + [f"{column.heading} {column.words[number]}" for column in extras]
            + [f"{len(group)} seeds"] * (len(group) > 1)
        )
        for number, (first, group) in enumerate(zip(firsts, groups, strict=True))
    ]


def _shown(label: str) -> str:
    """A label that matplotlib shows literally: not as a formula, and never left out."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _intervals(
    samples: Iterable[Sequence[float]], ends: Ends
) -> tuple[list[float], list[float], list[float]]:
    """The mean of each sample and the ends of its bar or band, in %."""
    found = []
    for sample in samples:
        values = finite(sample)
        low, high = ends(values) if len(values) > 1 else (average(values),) * 2
        found.append((average(values), low, high))
    middle, low, high = ([100 * value for value in values] for values in zip(*found, strict=True))
    return middle, low, high
