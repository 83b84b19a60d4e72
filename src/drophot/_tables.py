"""Rows of records and of differences, and how rows become text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from drophot import stats
from drophot.records import Record

STEPS = {
    "trained_accuracy": "before pruning",
    "pruned_accuracy": "after pruning",
    "finetuned_accuracy": "after fine-tuning",
}

# Columns that are there where their values differ: the heading, and what a flag reads as.
EXTRAS: dict[str, tuple[str, Mapping[object, str]]] = {
    "model": ("model", {}),
    "protocol": ("protocol", {}),
    "equal_steps": ("steps", {True: "equal", False: "fewer"}),
    "reinitialized": ("weights", {True: "new", False: "trained"}),
    "rewound": ("start", {True: "rewound", False: "kept"}),
    "recalibrated": ("BatchNorm", {True: "anew", False: "as trained"}),
    "schedule": ("schedule", {}),
    "scope": ("scope", {}),
    "structured": ("removed are", {True: "channels", False: "weights"}),
}

_FIRST = ("low", "high", "random")  # in a table; other modes follow as they come


@dataclass(frozen=True, slots=True)
class Table:
    """Cells to be read by people."""

    head: list[str]
    rows: list[list[str]]
    left: int
    """The number of columns of words, which come first; the others are numbers."""

    def text(self, *, bars: bool) -> str:
        """The table in lines, its columns aligned.

        Args:
            bars: Whether it is Markdown.

        Returns:
            The lines.
        """
        escaped = [[_line(cell, bars) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
        rule = ["-" * width for width in widths]
        if bars:
            rule[self.left :] = [dashes[1:] + ":" for dashes in rule[self.left :]]
        lines = [
            ("  ", " | ")[bars].join(
                cell.ljust(width) if column < self.left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (escaped[0], rule, *escaped[1:])
        ]
        return "\n".join(f"| {line} |" if bars else line.rstrip() for line in lines)


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Put runs together that differ in the seed alone.

    Args:
        records: The runs.

    Returns:
        Their groups, in the order in which each first appears.

    Raises:
        ValueError: If there are none.
    """
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        names = (*EXTRAS, "mode", "keep_ratio", "prune_ratio")
        found.setdefault(tuple(getattr(record, name) for name in names), []).append(record)
    if not found:
        raise ValueError("`records` should hold at least one record. Found none.")
    return list(found.values())


def accuracies(found: Sequence[Sequence[Record]]) -> Table:
    """A row for each group, with the mean and the standard deviation of each accuracy in %.

    Args:
        found: The groups.

    Returns:
        The table.
    """
    firsts = [group[0] for group in found]
    extras = [name for name in differing(firsts) if name != "model"]
    words = ["model", *(EXTRAS[name][0] for name in extras), "kept"]
    rows = [
        [
            first.model,
            *(word(first, name) for name in extras),
            first.mode,
            percent(first.keep_ratio),
            f"{first.kept:,}",
            percent(first.prune_ratio),
            f"{len(group)}",
            *(_spread([100 * getattr(record, step) for record in group]) for step in STEPS),
            f"{100 * mean(record.sparsity for record in group):.2f}",
        ]
        for first, group in zip(firsts, found, strict=True)
    ]
    numbers = ["share", "samples", "removed", "n", *STEPS.values(), "zeros held"]
    return Table(words + numbers, rows, len(words))


def comparisons(records: Sequence[Record], measure: stats.Measure) -> list[stats.Comparison]:
    """All differences of one table, their p-values adjusted for all of them together.

    Args:
        records: The runs.
        measure: Which accuracy.

    Returns:
        The differences; none if there is no baseline and no random subset to compare with.
    """
    references: list[stats.Against] = ["baseline", "random"]
    found = [
        comparison
        for reference in references
        if any(record.mode == reference for record in records)
        for comparison in stats.compare(records, against=reference, measure=measure)
    ]
    adjusted = stats.holm(comparison.p_value for comparison in found)
    return [replace(comparison, p_holm=p) for comparison, p in zip(found, adjusted, strict=True)]


def against(found: Sequence[stats.Comparison]) -> Table:
    """A row for each data ratio and prune ratio, with the differences in percentage points.

    More columns than the paper's do not fit on a screen: then each mode has a row.

    Args:
        found: The differences.

    Returns:
        The table.
    """
    lines: dict[tuple[Any, ...], dict[tuple[str, str], stats.Comparison]] = {}
    for one in found:
        key = tuple(getattr(one, name) for name in (*EXTRAS, "keep_ratio", "prune_ratio"))
        lines.setdefault(key, {})[one.mode, one.against] = one
    met = list(dict.fromkeys(pair for line in lines.values() for pair in line))
    columns = sorted(
        met,
        key=lambda pair: (
            pair[1] == "random",
            _FIRST.index(pair[0]) if pair[0] in _FIRST else len(_FIRST),
            met.index(pair),
        ),
    )
    extras = differing(found)
    words = [EXTRAS[name][0] for name in extras]
    names = {other: other.removesuffix("line") for _, other in columns}
    modes = list(dict.fromkeys(mode for mode, _ in columns))
    long = len(columns) > 5
    if long:
        words.append("kept")
        numbers = [f"− {name}" for name in names.values()]
        parts = [[(mode, other) for other in names] for mode in modes]
    else:
        numbers = [f"{mode} − {names[other]}" for mode, other in columns]
        parts = [columns]
    rows = []
    for _, line in sorted(lines.items()):
        for pairs in parts:
            cells = [line[pair] for pair in pairs if pair in line]
            if not cells:
                continue
            first = cells[0]
            seeds = sorted({one.n for one in cells})
            rows.append([
                *(word(first, name) for name in extras),
                *[first.mode] * long,
                percent(first.keep_ratio),
                percent(first.prune_ratio),
                "–".join(map(str, dict.fromkeys([seeds[0], seeds[-1]]))),
                *(_difference(line[pair]) if pair in line else "" for pair in pairs),
            ])
    return Table([*words, "share", "removed", "n", *numbers], rows, len(words))


def accuracies_csv(found: Iterable[Sequence[Record]]) -> str:
    """A row for each group, with a column for each number, unrounded.

    Args:
        found: The groups.

    Returns:
        The lines.
    """
    rows = []
    for group in found:
        names = (*EXTRAS, "mode", "keep_ratio", "kept", "prune_ratio")
        row: dict[str, object] = {name: getattr(group[0], name) for name in names}
        row["n"] = len(group)
        for name in (*STEPS, "sparsity"):
            values = [getattr(record, name) for record in group]
            row[f"{name}_mean"] = mean(values)
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else math.nan
        rows.append(row)
    return _csv(rows)


def against_csv(found: Iterable[stats.Comparison]) -> str:
    """A row for each difference, with all of its numbers, unrounded.

    Args:
        found: The differences.

    Returns:
        The lines.
    """
    before = (*EXTRAS, "keep_ratio", "prune_ratio", "mode", "against", "measure", "n", "difference")
    after = ("p_value", "p_holm", "effect_size")
    return _csv(
        {name: getattr(one, name) for name in before}
        | dict(zip(("low", "high"), one.interval, strict=True))
        | {name: getattr(one, name) for name in after}
        for one in found
    )


def differing(rows: Sequence[object]) -> list[str]:
    """What rows differ in, of model, protocol and controls.

    Args:
        rows: Records or comparisons.

    Returns:
        The names.
    """
    return [name for name in EXTRAS if len({getattr(row, name) for row in rows}) > 1]


def word(row: Any, name: str) -> str:
    """What a cell says of the model, the protocol or a control.

    Args:
        row: A record or a comparison.
        name: Of which.

    Returns:
        The word.
    """
    if name == "equal_steps" and row.mode == "baseline":
        return "all"
    value = getattr(row, name)
    return EXTRAS[name][1].get(value, str(value))


def percent(ratio: float) -> str:
    """A share as people read it: 0.1 is 10%, and 0.125 is 12.5%.

    Args:
        ratio: The share.

    Returns:
        The text.
    """
    return f"{100 * ratio:.4g}%"


def _difference(one: stats.Comparison) -> str:
    if one.n == 1:
        return _points(one.difference)
    low, high = map(_points, one.interval)
    # Two spaces where there is no mark keep the numbers of a column under one another.
    return f"{_points(one.difference)} [{low}, {high}]{' *' if one.p_holm < 0.05 else '  '}"


def _points(difference: float) -> str:
    """In percentage points, with a sign, and no minus zero."""
    return f"{100 * difference:+z.2f}".replace("-", "−")


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def _line(cell: str, bars: bool) -> str:
    """A cell in one line, and in Markdown in one cell."""
    cell = " ".join(cell.splitlines())
    return cell.replace("|", r"\|") if bars else cell


def _csv(rows: Iterable[dict[str, object]]) -> str:
    first, *others = rows
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(first)
    for row in (first, *others):
        writer.writerow("" if value != value else value for value in row.values())
    return file.getvalue().removesuffix("\n")
