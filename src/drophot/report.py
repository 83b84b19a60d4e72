"""Records as a table and as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from drophot.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = {
    "trained_accuracy": "before pruning",
    "pruned_accuracy": "after pruning",
    "finetuned_accuracy": "after fine-tuning",
}

# Okabe and Ito's colours for all kinds of colour vision, and markers and line styles besides, so
# that a figure reads without its colours.
_LOOKS = [
    ("o", "-", "#0072B2"),
    ("s", "--", "#D55E00"),
    ("^", ":", "#009E73"),
    ("D", "-.", "#000000"),
    ("v", "-", "#56B4E9"),
    ("P", "--", "#E69F00"),
    ("X", ":", "#CC79A7"),
    ("*", "-.", "#999999"),
]


def table(records: Iterable[Record]) -> str:
    """Accuracies before and after pruning and after fine-tuning, in %, as a Markdown table.

    Runs that differ in the seed alone share a row: the mean over seeds, with the standard
    deviation where there are several, and `n`, their number.

    Args:
        records: The runs.

    Returns:
        The table, with columns aligned for reading as text too.

    Raises:
        ValueError: If there are no records.
    """
    groups = _groups(records)
    rows = [("model", "kept", "share", "samples", "removed", "n", *_STEPS.values(), "zeros held")]
    rows += [
        (
            group[0].model,
            _what(group[0]),
            f"{group[0].keep_ratio:.0%}",
            f"{group[0].kept:,}",
            f"{group[0].prune_ratio:.0%}",
            f"{len(group)}",
            *(_spread([100 * getattr(record, step) for record in group]) for step in _STEPS),
            f"{100 * mean(record.sparsity for record in group):.2f}",
        )
        for group in groups
    ]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    left = 2  # columns of text; the others are numbers
    rule = ["-" * width if c < left else "-" * (width - 1) + ":" for c, width in enumerate(widths)]
    lines = [
        " | ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {line} |" for line in lines)


def plot_steps(records: Iterable[Record], *, ax: Axes | None = None) -> Axes:
    """Draw test accuracy before pruning, after pruning and after fine-tuning.

    A line for each group of runs that differ in the seed alone: the mean, with the standard
    deviation as a bar where there are several.

    Args:
        records: The runs.
        ax: Where to draw; `None` makes a new figure.

    Returns:
        The axes, not shown and not saved.

    Raises:
        ValueError: If there are no records.
        ImportError: If matplotlib is not installed.
    """
    groups = _groups(records)
    if ax is None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                'Figures come from matplotlib: pip install "drophot[plot]"'
            ) from error
        ax = Figure(layout="constrained").subplots()
    middle = (len(groups) - 1) / 2
    for number, group in enumerate(groups):
        values = [[100 * getattr(record, step) for record in group] for step in _STEPS]
        marker, style, colour = _LOOKS[number % len(_LOOKS)]
        ax.errorbar(
            [step + 0.06 * (number - middle) for step in range(len(_STEPS))],
            [mean(value) for value in values],
            yerr=[stdev(value) if len(value) > 1 else 0 for value in values],
            label=_label(group),
            marker=marker,
            linestyle=style,
            color=colour,
            capsize=3 if len(group) > 1 else 0,
        )
    ax.set_xticks(range(len(_STEPS)), list(_STEPS.values()))
    ax.set_ylabel("test accuracy (%)")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _groups(records: Iterable[Record]) -> list[Sequence[Record]]:
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        key = (record.model, record.mode, record.keep_ratio, record.prune_ratio)
        groups.setdefault(key, []).append(record)
    if not groups:
        raise ValueError("`records` should hold at least one record. Found none.")
    return list(groups.values())


def _what(record: Record) -> str:
    return record.mode


def _label(group: Sequence[Record]) -> str:
    first = group[0]
    share = "" if first.keep_ratio == 1 else f", {first.keep_ratio:.0%} kept"
    seeds = f", {len(group)} seeds" if len(group) > 1 else ""
    return f"{first.model}: {_what(first)}{share}{seeds}"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"
