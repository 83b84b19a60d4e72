"""What tells rows apart: a column for every setting in which they differ, short enough to read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drophot import cells
from drophot.records import Record, fingerprint
from drophot.stats import Comparison

# Columns with a heading and words of their own: the heading, and what a flag reads as.
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

_LONGEST = 50  # characters of a word
_NONE = "–"  # where a row does not say


@dataclass(frozen=True, slots=True)
class Column:
    """One thing in which rows differ: the name of a setting, a heading, and a word for each row."""

    name: str
    heading: str
    words: list[str]


def columns(rows: Sequence[Record | Comparison]) -> list[Column]:
    """What rows differ in beside the columns that a table always has."""
    found = [
        Column(name, EXTRAS[name][0], [word(row, name) for row in rows])
        for name in EXTRAS
        if len({getattr(row, name) for row in rows}) > 1
    ]
    long: dict[tuple[int, ...], list[str]] = {}
    for name, values in differing(rows).items():
        words = _words(values)
        if words is None:  # those that divide the rows alike share a column
            texts = [_json(value) for value in values]
            long.setdefault(tuple(map(texts.index, texts)), []).append(name)
        else:
            found.append(Column(name, name, words))
    for names in long.values():
        parts = [[settings(row).get(name) for name in names] for row in rows]
        words = [fingerprint({"": p})[:8] if p != [None] * len(p) else _NONE for p in parts]
        found.append(Column(names[0], ", ".join(names), words))
    alike: dict[tuple[object, ...], set[str]] = {}
    texts = [_json(settings(row)) for row in rows]
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        shown = (row.mode, row.keep_ratio, row.prune_ratio, *(c.words[number] for c in found))
        alike.setdefault(shown, set()).add(text)
    if any(len(set_) > 1 for set_ in alike.values()):  # some say nothing where others differ
        found.append(Column("settings", "settings", [fingerprint({"": t})[:8] for t in texts]))
    return found


def differing(rows: Sequence[Record | Comparison]) -> dict[str, list[Any]]:
    """The settings beside `EXTRAS` in which rows differ, with each row's value or `None`."""
    known = [settings(row) for row in rows]
    found = {}
    for name in dict.fromkeys(name for values in known for name in values):
        values = [values.get(name) for values in known]
        if len({_json(value) for value in values if value is not None}) > 1:
            found[name] = values
    return found


def settings(row: Record | Comparison) -> dict[str, Any]:
    """The settings of a row beside `EXTRAS`, and what else is known of what was asked for."""
    return cells.known(row) if isinstance(row, Record) else row.settings


def word(row: Record | Comparison, name: str) -> str:
    """What a row says of one of `EXTRAS`."""
    if name == "equal_steps" and row.mode == "baseline":
        return "all"
    value = getattr(row, name)
    return EXTRAS[name][1].get(value, str(value))


def order(rows: Sequence[Record]) -> Callable[[Record], tuple[Any, ...]]:
    """A key to sort records by the settings in which they differ, numbers by their size."""
    names = list(differing(rows))

    def key(row: Record) -> tuple[Any, ...]:
        values = settings(row)
        return tuple(_natural(values.get(name)) for name in names)

    return key


def _natural(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return (not number, float(value) if number else 0.0, _json(value))


def _words(values: Sequence[Any]) -> list[str] | None:
    """The values of one setting in short words that tell them apart, if there are such."""
    # Of nested settings the numbers in which they differ, and texts where these do not suffice.
    leaves = [_leaves(value) for value in values]
    names = dict.fromkeys(name for leaf in leaves for name in leaf)
    apart = [name for name in names if len({_json(leaf.get(name)) for leaf in leaves}) > 1]
    texts = [n for n in apart if any(isinstance(leaf.get(n), (str, list)) for leaf in leaves)]
    shown = [name for name in apart if name not in texts]

    def words() -> list[str]:
        parts = [[(name, _text(leaf.get(name))) for name in shown] for leaf in leaves]
        return [", ".join(f"{n}={t}" if n else t for n, t in part) for part in parts]

    distinct = len({_json(value) for value in values})
    while len(set(words())) < distinct and texts:
        shown.append(texts.pop(0))
    found = words()
    short = max(map(len, found)) <= _LONGEST
    return found if short and len(set(found)) == distinct else None


def _leaves(value: Any, before: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; a plain one by none."""
    if not isinstance(value, Mapping):
        return {before: value}
    found = {}
    for name, inner in value.items():
        found |= _leaves(inner, f"{before}.{name}" if before else name)
    return found


def _text(value: Any) -> str:
    """A value as people read it: `SGD(lr=0.1)` for `torch.optim.sgd.SGD(lr=0.1)`."""
    if value is None:
        return _NONE
    if isinstance(value, str):
        value = re.sub(r"(?<![\w.])(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", value)
        return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{4,}\b", r"\1", value)  # a digest
    if isinstance(value, list) and not any(isinstance(part, (list, Mapping)) for part in value):
        return ", ".join(map(_text, value))
    return json.dumps(value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
