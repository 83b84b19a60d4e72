"""Tables of accuracies and of differences, as text and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from drophot import stats
from drophot._core.mode_names import BASELINE
from drophot.records.record import Record
from drophot.report import setting_columns
from drophot.report.setting_columns import FIELDS
from drophot.settings.names import Mode

STEPS = {
    "trained_accuracy": "before pruning",
    "pruned_accuracy": "after pruning",
    "finetuned_accuracy": "after fine-tuning",
}

MISSING = "–"  # for an accuracy that is nan
FIRST = ("low", "high", "random")  # in this order; other modes follow in the order of the records


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text."""

    head: list[str]
    rows: list[list[str]]
    left: int
    """The number of leading columns that hold words; the others hold numbers."""

    def text(self, *, bars: bool) -> str:
        """The table in lines with aligned columns; with bars it is Markdown."""
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


def accuracies(found: Sequence[Sequence[Record]]) -> Table:
    """A row for each cell with the mean and the standard deviation of each accuracy, in %."""
    firsts = [runs[0] for runs in found]
    extras = [column for column in setting_columns.columns(firsts) if column.name != "model"]
    words = ["model", *(column.heading for column in extras), "kept"]
    rows = [
        [
            first.model,
            *(column.words[number] for column in extras),
            first.mode,
            percent(first.keep_ratio),
            f"{first.num_kept:,}",
            percent(first.prune_ratio),
            f"{len(runs)}",
            *(_spread([100 * getattr(run, step) for run in runs]) for step in STEPS),
            _zeros(runs),
        ]
        for number, (first, runs) in enumerate(zip(firsts, found, strict=True))
    ]
    numbers = ["share", "samples", "removed", "n", *STEPS.values(), "zeros held"]
    return Table(words + numbers, rows, len(words))


def comparisons(
    records: Sequence[Record], measure: stats.Measure, against: str | Mode | None = None
) -> list[stats.Comparison]:
    """All differences of a table, with p-values that are adjusted for all of them together.

    Without `against`, cells are compared with the baseline and with random, as far as the records
    have them.
    """
    references: list[str | Mode] = [BASELINE, "random"]
    if against is None:
        present = {record.mode for record in records}
        references = [mode for mode in references if mode in present]
    else:
        references = [against]
    found = [
        comparison
        for reference in references
        for comparison in stats.compare(records, against=reference, measure=measure)
    ]
    adjusted = stats.holm(comparison.p_value for comparison in found)
    return [replace(comparison, p_holm=p) for comparison, p in zip(found, adjusted, strict=True)]


def against(found: Sequence[stats.Comparison]) -> Table:
    """A row for each data ratio and prune ratio, with the differences in percentage points.

    More columns than the paper's would not fit on a screen; each mode then has its own row.
    """
    extras = setting_columns.columns(found)
    position = {id(one): number for number, one in enumerate(found)}
    lines: dict[tuple[Any, ...], dict[tuple[str, str], stats.Comparison]] = {}
    for one in found:
        names = (*FIELDS, "keep_ratio", "prune_ratio")
        key = (*(getattr(one, n) for n in names), json.dumps(one.settings, sort_keys=True))
        lines.setdefault(key, {})[one.mode, one.against] = one
    met = list(dict.fromkeys(pair for line in lines.values() for pair in line))
    columns = sorted(
        met,
        key=lambda pair: (
            pair[1] == "random",
            FIRST.index(pair[0]) if pair[0] in FIRST else len(FIRST),
            met.index(pair),
        ),
    )
    words = [column.heading for column in extras]
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
            present = [line[pair] for pair in pairs if pair in line]
            if not present:
                continue
            first = present[0]
            seeds = sorted({one.n for one in present})
            rows.append([
                *(column.words[position[id(first)]] for column in extras),
                *[first.mode] * long,
                percent(first.keep_ratio),
                percent(first.prune_ratio),
                "–".join(map(str, dict.fromkeys([seeds[0], seeds[-1]]))),
                *(_difference(line[pair]) if pair in line else "" for pair in pairs),
            ])
    return Table([*words, "share", "removed", "n", *numbers], rows, len(words))


def accuracies_csv(found: Sequence[Sequence[Record]]) -> str:
    """A row for each cell, with a column for each number, unrounded."""
    rows = []
    names = (*FIELDS, "mode", "keep_ratio", "num_kept", "prune_ratio")
    more = setting_columns.differing([runs[0] for runs in found])
    for number, runs in enumerate(found):
        row: dict[str, object] = {name: getattr(runs[0], name) for name in names}
        row |= {name: _value(values[number]) for name, values in more.items()}
        row |= {"cell": runs[0].cell, "n": len(runs)}
        for name in (*STEPS, "sparsity"):
            values = [getattr(run, name) for run in runs]
            row[f"{name}_mean"], row[f"{name}_std"] = average(values), deviation(values)
            row[f"{name}_n"] = len(finite(values))
        rows.append(row)
    return csv_text(rows)


def against_csv(found: Sequence[stats.Comparison]) -> str:
    """A row for each difference, with all of its numbers, unrounded."""
    names, more = (*FIELDS, "keep_ratio", "prune_ratio"), setting_columns.differing(found)
    middle = ("mode", "against", "measure", "n", "difference")
    after = ("p_value", "p_holm", "effect_size")
    return csv_text(
        {name: getattr(one, name) for name in names}
        | {name: _value(values[number]) for name, values in more.items()}
        | {name: getattr(one, name) for name in middle}
        | dict(zip(("low", "high"), one.interval, strict=True))
        | {name: getattr(one, name) for name in after}
        for number, one in enumerate(found)
    )


def finite(values: Iterable[float]) -> list[float]:
    """The values that are not nan, which is the accuracy of a diverged or an unmeasured step."""
    return [value for value in values if math.isfinite(value)]


def average(values: Iterable[float]) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    return mean(found) if (found := finite(values)) else math.nan


def deviation(values: Iterable[float]) -> float:
    """The standard deviation of the values that are not nan; nan if there are fewer than two."""
    return stdev(found) if len(found := finite(values)) > 1 else math.nan


def percent(ratio: float) -> str:
    """A share in percent: 0.1 is 10%, and 0.125 is 12.5%."""
    return f"{100 * ratio:.4g}%"


def _difference(one: stats.Comparison) -> str:
    if one.n == 0:
        return MISSING
    low, high = one.interval
    if math.isnan(low):
        return _points(one.difference)
    # Two spaces where there is no mark keep the numbers of a column under one another.
    mark = " *" if one.p_holm < 0.05 else "  "
    return f"{_points(one.difference)} [{_points(low)}, {_points(high)}]{mark}"


def _points(difference: float) -> str:
    """A difference in percentage points, with a sign but never a negative zero."""
    return f"{100 * difference:+z.2f}".replace("-", "−")


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation without nan, and the number of values if some are nan."""
    if not (found := finite(values)):
        return MISSING
    text = f"{mean(found):.2f}"
    if len(found) > 1:
        text += f" ± {stdev(found):.2f}"
    return text if len(found) == len(values) else f"{text} (n = {len(found)})"


def _zeros(runs: Sequence[Record]) -> str:
    held = average(run.sparsity for run in runs)
    return MISSING if math.isnan(held) else f"{100 * held:.2f}"


def _value(value: Any) -> object:
    """A setting as CSV holds it: plain if possible, else as JSON."""
    plain = value is None or isinstance(value, (str, int, float))
    return value if plain else json.dumps(value, sort_keys=True)


def _line(cell: str, bars: bool) -> str:
    """The text of a cell in one line, escaped for Markdown."""
    cell = " ".join(cell.splitlines())
    return cell.replace("|", r"\|") if bars else cell


def csv_text(rows: Iterable[dict[str, object]]) -> str:
    """Rows that have the same columns, as CSV with a head."""
    first, *others = rows
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(first)
    for row in (first, *others):
        writer.writerow("" if value != value else value for value in row.values())
    return file.getvalue().removesuffix("\n")
