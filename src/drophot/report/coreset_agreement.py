"""How much coresets agree, over seeds and between modes, as a table and as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean

import numpy as np

from drophot._core.arrays import IntArray
from drophot.records.cells import group_by_cell, shared_settings
from drophot.records.coreset_text import from_text
from drophot.records.record import Record
from drophot.report import setting_columns
from drophot.report.tables import FIRST, MISSING, Table, csv_text, percent
from drophot.stats import Stability, stability

_NONE = (math.nan, math.nan)


@dataclass(slots=True)
class Coresets:
    """The coresets of a mode by seed. Cells with the same coresets share them."""

    first: Record
    total: int
    """The number of samples that they were selected from."""
    by_seed: dict[int, IntArray]
    settings: set[tuple[object, ...]] = field(default_factory=set[tuple[object, ...]])
    """Those of the cells, except for the mode."""

    def over_seeds(self) -> Stability | None:
        """Their agreement, if there are several seeds."""
        held = self.by_seed.values()
        return stability(held, self.total) if len(held) > 1 else None

    def with_other(self, other: Coresets) -> tuple[float, int] | None:
        """The mean agreement with those of another mode for the same seed, and how many seeds."""
        seeds = [seed for seed in self.by_seed if seed in other.by_seed]
        if not seeds or self.total != other.total or not self.settings & other.settings:
            return None
        both = ([self.by_seed[seed], other.by_seed[seed]] for seed in seeds)
        return mean(stability(pair, self.total).index for pair in both), len(seeds)


def coresets_of(records: Iterable[Record]) -> list[Coresets]:
    """The coresets that records hold, by model, data ratio and mode."""
    found: list[Coresets] = []
    for runs in group_by_cell(records):
        held = {run.seed: from_text(run.coreset) for run in runs if run.coreset}
        if not held:
            continue
        total = next(iter(held.values()))[1]
        one = Coresets(runs[0], total, {seed: indices for seed, (indices, _) in held.items()})
        same = next((known for known in found if _is_same(known, one)), None)
        if same is None:
            found.append(one)
        else:
            same.by_seed |= one.by_seed
        (same or one).settings.add(shared_settings(runs[0], {"mode"}))
    return sorted(found, key=_order)


def _is_same(one: Coresets, other: Coresets) -> bool:
    """Whether two cells, for example of two prune ratios, have the coresets of one selection."""
    names = ("model", "mode", "keep_ratio")
    seeds = one.by_seed.keys() & other.by_seed.keys()
    return (
        all(getattr(one.first, name) == getattr(other.first, name) for name in names)
        and one.total == other.total
        and bool(seeds)
        and all(np.array_equal(one.by_seed[seed], other.by_seed[seed]) for seed in seeds)
    )


def _order(one: Coresets) -> tuple[str, float, int]:
    mode = one.first.mode
    rank = FIRST.index(mode) if mode in FIRST else len(FIRST)
    return one.first.model, one.first.keep_ratio, rank


def has_agreement(found: list[Coresets]) -> bool:
    """Whether there is anything to compare."""
    return any(len(one.by_seed) > 1 for one in found) or any(
        one.with_other(other) for one, other in combinations(found, 2)
    )


def table(found: list[Coresets]) -> Table:
    """A row for each mode and data ratio, with a column for the seeds and one for each mode."""
    firsts = [one.first for one in found]
    extras = setting_columns.columns(firsts)
    modes = list(dict.fromkeys(first.mode for first in firsts))
    modes = modes if len(modes) > 1 else []
    rows = [
        [
            *(column.words[number] for column in extras),
            one.first.mode,
            percent(one.first.keep_ratio),
            f"{len(one.by_seed)}",
            _interval(one.over_seeds()),
            *("" if mode == one.first.mode else _between(one, mode, found) for mode in modes),
        ]
        for number, one in enumerate(found)
    ]
    words = [*(column.heading for column in extras), "kept"]
    return Table([*words, "share", "n", "over seeds", *modes], rows, len(words))


def csv(found: list[Coresets]) -> str:
    """A row for each agreement, unrounded. That over seeds has no other mode."""
    return csv_text(_csv_rows(found))


def _csv_rows(found: list[Coresets]) -> Iterator[dict[str, object]]:
    for one in found:
        if (over := one.over_seeds()) is not None:
            interval = over.interval if over.n > 2 else _NONE
            yield _csv_row(one, "", over.n, over.index, interval)
    for one, other in combinations(found, 2):
        if (between := one.with_other(other)) is not None:
            yield _csv_row(one, other.first.mode, between[1], between[0], _NONE)


def _csv_row(
    one: Coresets, other: str, n: int, index: float, interval: tuple[float, float]
) -> dict[str, object]:
    names = (*setting_columns.FIELDS, "mode")
    return {
        **{name: getattr(one.first, name) for name in names},
        "other_mode": other,
        "keep_ratio": one.first.keep_ratio,
        "cell": one.first.cell,
        "n": n,
        "index": index,
        "low": interval[0],
        "high": interval[1],
    }


def _between(one: Coresets, mode: str, found: list[Coresets]) -> str:
    others = (one.with_other(other) for other in found if other.first.mode == mode)
    between = next((other for other in others if other is not None), None)
    return MISSING if between is None else _number(between[0])


def _interval(found: Stability | None) -> str:
    if found is None:
        return MISSING
    if found.n == 2:  # whose interval has no width
        return _number(found.index)
    low, high = found.interval
    return f"{_number(found.index)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:z.2f}".replace("-", "−")
