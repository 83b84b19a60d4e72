"""The HTML page of a grid: its order, text and style around given tables and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from drophot._core.mode_names import BASELINE
from drophot.records.cells import cell_of, check_records, group_by_cell, shared_settings
from drophot.records.pairs import free_settings
from drophot.records.record import Record
from drophot.report import setting_columns
from drophot.report.grid_folder import planned_runs, read_store
from drophot.report.page_style import STYLE
from drophot.report.setting_columns import FIELDS, columns, order
from drophot.report.svg_panels import NAMES, ONE_SEED, Panels, note, several, values
from drophot.report.tables import Table, percent
from drophot.settings.names import needs_scoring
from drophot.settings.tables import RECORD_FIELDS, SCORING_ONLY, varying

_HOW = {
    "Run, cell": "A run is one network, trained, pruned and fine-tuned with one seed. A cell is "
    "the runs that differ only in their seed. Each row of Table 2 is a cell.",
    "n": "The number of seeds. Each seed has its own initial weights, order and random coresets.",
    "Share, removed, zeros held": "The share of the training samples that was kept, the share of "
    "the prunable weights that was removed, and the share of them that is zero at the end.",
    "Low, high": "Coresets of the samples that were forgotten least often and most often while a "
    "network was trained on all samples. Other modes are named after their score or method.",
    "Baseline": "All samples are kept; the rest is the same. Training takes more steps than on a "
    "coreset, unless a column says that they are equal.",
    "Random": "A coreset of the same size, drawn at random. A difference between another mode and "
    "random is due to how that mode chooses samples. A difference between random and the baseline "
    "is due to the size alone.",
    "Bars, bands": "95 % confidence intervals of the mean. With fewer than 5 seeds, they reach "
    "from the lowest to the highest seed instead, because the intervals would hide the lines.",
    "[ ]": "The 95 % confidence interval by Student's t. That of a difference is the interval of "
    "the differences within each seed. With few seeds it is wide.",
    "–": "There is no accuracy: the run diverged, or the accuracy was not measured. Means are of "
    "the other runs, and (n = ...) gives their number.",
    "*": "p < 0.05 in the paired t-test after Holm's correction for all differences of the table. "
    "If no difference were real, the probability of any star in the table would be at most 5 %. A "
    "difference without a star is not proof that two modes are equal.",
    "Last epoch": "Every accuracy is measured on the test set after the last epoch. The best epoch "
    "is never picked, because that would be a choice by the test set.",
}


@dataclass(frozen=True, slots=True)
class Source:
    """The content of a page."""

    records: list[Record]
    """The baseline first, then by data ratio, prune ratio, mode and seed."""
    runs: int
    """The number of records once the grid is finished."""
    configuration: Mapping[str, Any]


def load(source: Iterable[Record] | Path | str) -> Source:
    """Read records, or the folder of a grid, in which a line may be incomplete."""
    grid: dict[str, Any] = {}
    if isinstance(source, (Path, str)):
        grid, lines = read_store(Path(source))
        # A stage that was computed twice, for example by two processes, has two lines.
        source = {(cell_of(line), line.seed): line for line in lines}.values()
    source = check_records(source, "source")
    if not source:
        raise ValueError(
            "`source` must hold at least one record, got none so far. Wait until a run is done."
        )
    found = group_by_cell(source, "source")
    more = order([runs[0] for runs in found])
    keys = [((*more(runs[0]), *_order(run)), run) for runs in found for run in runs]
    records = [run for _, run in sorted(keys, key=lambda pair: pair[0])]
    runs = max(planned_runs(grid), len(records))
    return Source(records, runs, grid.get("configuration", {}))


def page(
    source: Source,
    *,
    accuracies: Table,
    differences: Table | None,
    agreement: Table | None,
    panels: Panels,
) -> str:
    """The HTML of the page; a table is `None` if there is nothing to compare."""
    parts_of = _figures(source.records)

    def drawn(draw: Callable[[list[Record]], str]) -> str:
        if len(parts_of) == 1:
            return draw(parts_of[0][1])
        names: dict[str, list[str]] = {}  # parts left out for one reason have the same text
        for name, runs in parts_of:
            names.setdefault(draw(runs), []).append(name)
        if len(names) == 1:
            return next(iter(names))
        return "".join(f"<h3>{escape('; '.join(n))}</h3>{text}" for text, n in names.items())

    parts = {
        "Figure 1: accuracy by share of data and of weights": drawn(panels.ratios),
        "Table 1: differences after fine-tuning": _differences(source, differences),
        "Figure 2: accuracy over the epochs of fine-tuning": drawn(panels.curves),
        "Figure 3: accuracy before and after pruning": drawn(panels.steps),
        "Table 2: all accuracies": note("In %, the mean over n seeds ± standard deviation.")
        + _table(accuracies),
        "Table 3: agreement of the coresets": _agreement(agreement),
        "Table 4: seconds": _seconds(source.records),
        "Table 5: settings that differ": _differing(source.records),
        "Table 6: configuration": _configuration(
            source.configuration or setting_columns.shared(source.records)
        ),
        "How to read this": _how(),
    }
    models = ", ".join(dict.fromkeys(record.model for record in source.records))
    title = escape(f"{models}: coresets, pruned and fine-tuned")
    body = "".join(f"<section><h2>{n}</h2>{text}</section>" for n, text in parts.items() if text)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{title}</h1>{_summary(source)}{body}</main></body></html>\n"
    )


def _order(record: Record) -> tuple[Any, ...]:
    coreset = record.mode != BASELINE
    setting = (*(str(getattr(record, name)) for name in reversed(FIELDS)), coreset)
    mode = list(NAMES).index(record.mode) if record.mode in NAMES else len(NAMES)
    return (*setting, record.keep_ratio, record.prune_ratio, mode, record.seed)


def _figures(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The records of each figure with their baseline, and a label."""
    inside = {"mode", "keep_ratio", "prune_ratio"}  # these differ within a figure
    loose = inside | free_settings(BASELINE)
    groups: dict[tuple[object, ...], list[Record]] = {}
    baselines: dict[object, list[Record]] = {}
    only = all(record.mode == BASELINE for record in records)
    for runs in group_by_cell(records):
        if runs[0].mode == BASELINE and not only:
            for free in (loose, loose - SCORING_ONLY):
                key = (len(free), shared_settings(runs[0], free))
                baselines.setdefault(key, []).extend(runs)
        else:
            groups.setdefault(shared_settings(runs[0], inside), []).extend(runs)
    extras = columns([runs[0] for runs in groups.values()])
    found = []
    for number, runs in enumerate(groups.values()):
        label = ", ".join(f"{column.heading}: {column.words[number]}" for column in extras)
        # Baselines that were scored alike take precedence.
        frees = (loose - SCORING_ONLY, loose)
        served = [baselines.get((len(free), shared_settings(runs[0], free)), []) for free in frees]
        found.append((label, runs + (served[0] or served[1])))
    return found


def _differences(source: Source, differences: Table | None) -> str:
    if differences is None:
        return note(
            "Left out: there is nothing to compare. Differences need coresets, and a baseline or "
            "random coresets to compare them with."
        )
    modes = {record.mode for record in source.records}
    text = "Percentage points of test accuracy, the mean over n seeds"
    if several(source.records):
        text += ", [its 95 % interval], and * where p < 0.05 after Holm's correction for the "
        text += "whole table."
    else:
        text += f". {ONE_SEED}"
    for mode, name in {BASELINE: "baseline", "random": "random coreset"}.items():
        text += f" There is no {name} to compare with." * (mode not in modes)
    return note(text) + _table(differences)


def _agreement(table: Table | None) -> str:
    if table is None:
        return note(
            "Left out: the records do not hold two coresets to compare, of several seeds or modes."
        )
    return note(
        "1 if coresets are equal, 0 on average if they are random. Over seeds: the agreement of "
        "the coresets of n seeds, [its 95 % interval], which is too narrow if n is below 10. Under "
        "a mode: the agreement with that mode for the same seed, the mean over seeds."
    ) + _table(table)


def _summary(source: Source) -> str:
    runs = source.records
    kept = sorted({record.num_kept for record in runs if record.mode != BASELINE})
    every = sorted({record.num_kept for record in runs if record.mode == BASELINE})
    modes = list(dict.fromkeys(record.mode for record in runs if record.mode != BASELINE))
    epochs = sorted({len(record.finetune_curve) for record in runs})
    seeds = sorted({record.seed for record in runs})
    text = ", ".join(dict.fromkeys(record.model for record in runs))
    if kept:
        text += f" trained on coresets ({', '.join(modes)}) of {_span(kept)}"
        text += f" of {_span(every)}" * bool(every) + " training samples"
        text += ", and on all of them" * bool(every)
    else:
        text += f" trained on {_span(every)} samples"
    ratios = values(runs, "prune_ratio")
    shares = ", ".join(percent(ratio) for ratio in ratios)
    text += f"; pruned by {shares} of the weights" if any(ratios) else "; not pruned"
    tuned = f"fine-tuned on everything for {_span(epochs)} epochs"
    text += f"; {tuned if any(epochs) else 'not fine-tuned'}"
    text += f"; {len(seeds)} seed{'s' * (len(seeds) > 1)}. "
    devices = ", ".join(dict.fromkeys(record.device for record in runs))
    versions: dict[str, dict[str, None]] = {}
    for record in runs:
        for name, version in record.versions.items():
            versions.setdefault(name, {})[version] = None
    with_ = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    text += f"On {devices}" + f" with {with_}" * bool(with_) + "."
    if len(runs) < source.runs:
        done = f"{len(runs):,} of {source.runs:,} runs so far."
    else:
        done = f"{_count(len(runs), 'run')}."
    cells = group_by_cell(runs)
    sizes = sorted({len(found) for found in cells})
    done += f" {_count(len(cells), 'cell')}, {'each ' * (len(cells) > 1)}with {_span(sizes)} seed"
    done += f"{'s' * (sizes != [1])}."
    return f"<p>{escape(text)} <strong>{done}</strong></p>"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _differing(records: Sequence[Record]) -> str:
    found = setting_columns.values_in_full(records)
    if not found:
        return note("Left out: the runs differ only in settings that the tables show in full.")
    rows = [
        [
            escape(value.name),
            escape(value.text),
            escape(", ".join(value.shown)),
            str(len(value.rows)),
        ]
        for value in found
    ]
    head = ("setting", "value", "in the tables", "runs")
    lines = ["".join(f"<th{' class=w' * (n < 3)}>{name}</th>" for n, name in enumerate(head))]
    kinds = (" class=w", " class=v", " class=w", "")
    for row in rows:
        lines.append("".join(f"<td{k}>{cell}</td>" for k, cell in zip(kinds, row, strict=True)))
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    text = (
        "Settings in which runs differ, other than those that the tables show in full. Tables show "
    )
    text += "long values by a short word or by eight digits."
    head = f"<thead><tr>{lines[0]}</tr></thead>"
    return f'{note(text)}<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _seconds(records: Sequence[Record]) -> str:
    varied = {RECORD_FIELDS.get(name, name) for name in varying()}
    # A stage that cells share has the same seconds in each of them.
    found: dict[str, dict[tuple[object, ...], float]] = {}
    for runs in group_by_cell(records):
        # The settings that all cells of a grid share.
        grid = shared_settings(runs[0], varied)
        for run in runs:
            for step, seconds in run.seconds.items():
                found.setdefault(step, {})[grid, run.seed, seconds] = seconds
    rows = [
        [step, f"{len(times):,}", _amount(mean(times.values())), _amount(sum(times.values()))]
        for step, times in ((step, found[step]) for step in sorted(found, key=_step_order))
    ]
    if not rows:
        return note("Left out: no seconds were recorded.")
    total = sum(sum(times.values()) for times in found.values())
    rows.append(["all", "", "", _amount(total)])
    text = "Wall-clock seconds of each step. A step that several runs share counts once, also the "
    text += "scoring, which all coresets of a seed share and whose network may be the baseline's."
    scored = [run for run in records if needs_scoring(run.mode)]
    if untimed := dict.fromkeys(run.mode for run in scored if "score" not in run.seconds):
        text += f" Runs of {', '.join(untimed)} have no time of scoring: their scores were given."
    return note(text) + _table(Table(["step", "times", "mean", "sum"], rows, 1))


_STEPS = ("score", "select", "train", "prune", "finetune")


def _step_order(step: str) -> tuple[int, str]:
    return (_STEPS.index(step) if step in _STEPS else len(_STEPS), step)


def _amount(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds >= 1 else f"{seconds:.3f}"


def _configuration(configuration: Mapping[str, Any]) -> str:
    if not configuration:
        return note("Left out: the runs share no settings, or their records do not hold them.")
    rows = "".join(
        f'<tr><td class="w">{escape(name)}</td><td class="v">{escape(value)}</td></tr>'
        for name, value in _flat(configuration)
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value if isinstance(value, str) else json.dumps(value)


def _how() -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _HOW.items())
    return f"<dl>{items}</dl>"


def _table(table: Table) -> str:
    def tag(name: str, column: int, content: str) -> str:
        return f"<{name}{' class=w' * (column < table.left)}>{content}</{name}>"

    head = "".join(tag("th", column, escape(name)) for column, name in enumerate(table.head))
    # A thin rule marks where the data ratio, the network, the protocol or a control changes.
    block = [
        column
        for column, name in enumerate(table.head)
        if "share" in table.head and (name == "share" or (column < table.left and name != "kept"))
    ]
    before, lines = None, []
    for row in table.rows:
        tags = "".join(tag("td", column, _cell(cell)) for column, cell in enumerate(row))
        key = [row[column] for column in block]
        lines.append(f"<tr{' class=first' * (key != before and bool(lines))}>{tags}</tr>")
        before = key
    body = "".join(lines)
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """A cell with its interval or spread in a softer color, and its star at a fixed place."""
    text = escape(text)
    if found := re.fullmatch(r"(\S+) (\[.*\]) ( |\*)", text):
        number, interval, mark = found.groups()
        number = f"<b>{number}</b>" if mark == "*" else number
        return f"{number} <small>{interval}</small><i>{mark.strip()}</i>"
    return re.sub(r" (± \S+)$", r" <small>\1</small>", text)


def _span(numbers: Sequence[int]) -> str:
    """The first and the last of sorted numbers as text."""
    return " to ".join(dict.fromkeys(f"{number:,}" for number in (*numbers[:1], *numbers[-1:])))
