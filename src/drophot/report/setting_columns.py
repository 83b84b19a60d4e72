"""The columns that tell rows apart: one for every setting in which they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drophot._core.mode_names import BASELINE
from drophot.records.cells import CELL_FIELDS, known_settings
from drophot.records.record import Record, fingerprint
from drophot.settings.tables import RECORD_FIELDS, SETTINGS
from drophot.stats import Comparison

_OF_FIELDS = {field: SETTINGS[name] for name, field in RECORD_FIELDS.items()}

FIELDS = (
    "model",
    *(name for name in CELL_FIELDS if name in _OF_FIELDS and _OF_FIELDS[name].heading),
)
"""The fields of a record that have a column only if rows differ in them."""

_LONGEST = 50  # characters of a word
_NONE = "–"  # for rows that do not hold the setting


@dataclass(frozen=True, slots=True)
class Column:
    """A setting in which rows differ: its name, a heading, and a word for each row."""

    name: str
    heading: str
    words: list[str]
    names: tuple[str, ...] = ()
    """All settings of the column, if several share it."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a setting in which rows differ."""

    name: str
    """The setting; of nested settings, the dotted name."""
    text: str
    """The value in full."""
    shown: tuple[str, ...]
    """The words for it in a column of the tables."""
    rows: tuple[int, ...]
    """The rows that have it."""


def columns(rows: Sequence[Record | Comparison]) -> list[Column]:
    """The settings in which rows differ, without those that have a column in every table."""
    found = [
        Column(name, _heading(name), [word(row, name) for row in rows])
        for name in FIELDS
        if len({getattr(row, name) for row in rows}) > 1
    ]
    long: dict[tuple[int, ...], list[str]] = {}
    for name, values in differing(rows).items():
        words = _words([_in_words(name, value) for value in values])
        if words is None:  # settings that divide the rows alike share a column
            texts = [_json(value) for value in values]
            long.setdefault(tuple(map(texts.index, texts)), []).append(name)
        else:
            found.append(Column(name, _heading(name), words))
    for names in long.values():
        parts = [[settings(row).get(name) for name in names] for row in rows]
        words = [fingerprint({"": p})[:8] if p != [None] * len(p) else _NONE for p in parts]
        found.append(Column(names[0], ", ".join(map(_heading, names)), words, tuple(names)))
    alike: dict[tuple[object, ...], set[str]] = {}
    texts = [_json(settings(row)) for row in rows]
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        shown = (row.mode, row.keep_ratio, row.prune_ratio, *(c.words[number] for c in found))
        alike.setdefault(shown, set()).add(text)
    if any(len(set_) > 1 for set_ in alike.values()):  # some rows lack what others differ in
        found.append(Column("settings", "settings", [fingerprint({"": t})[:8] for t in texts]))
    return found


def values_in_full(rows: Sequence[Record | Comparison]) -> list[Value]:
    """Every value of every setting in which rows differ, unabridged."""
    shown = {name: c.words for c in columns(rows) for name in (c.names or (c.name,))}
    found = []
    for name, values in differing(rows).items():
        leaves = [_leaves(value, name) for value in values]
        for leaf in dict.fromkeys(leaf for values in leaves for leaf in values):
            texts = [_in_full(values.get(leaf)) for values in leaves]
            distinct = dict.fromkeys(texts)
            if len(distinct) == 1:
                continue
            for text in distinct:
                having = tuple(n for n, other in enumerate(texts) if other == text)
                words = dict.fromkeys(shown[name][n] for n in having) if name in shown else ()
                found.append(Value(leaf, text, tuple(words), having))
    return found


def shared(rows: Sequence[Record]) -> dict[str, Any]:
    """The settings without a field that all rows have in common; none in older records."""
    first, *others = (settings(row) if row.settings else {} for row in rows)
    return {
        name: value
        for name, value in first.items()
        if all(name in other and _json(other[name]) == _json(value) for other in others)
    }


def differing(rows: Sequence[Record | Comparison]) -> dict[str, list[Any]]:
    """The settings without a field in which rows differ, with the value of each row or `None`."""
    known = [settings(row) for row in rows]
    found = {}
    for name in dict.fromkeys(name for values in known for name in values):
        values = [values.get(name) for values in known]
        distinct = {_json(value) for value in values if value is not None}
        if len(distinct) > 1 and not _shown_by_field(rows, name, values):
            found[name] = values
    return found


def _shown_by_field(rows: Sequence[Record | Comparison], name: str, values: Sequence[Any]) -> bool:
    """Whether the field of a record tells rows with different values apart, as names of objects."""
    if name not in CELL_FIELDS:
        return False
    shown = [getattr(row, name) for row in rows]
    return len(set(zip(shown, map(_json, values), strict=True))) == len(set(shown))


def settings(row: Record | Comparison) -> dict[str, Any]:
    """The settings of a row that have no field of their own."""
    return known_settings(row) if isinstance(row, Record) else row.settings


def word(row: Record | Comparison, name: str) -> str:
    """The word for the value of a field in a row."""
    if name == "equal_steps" and row.mode == BASELINE:
        return "all"
    value = getattr(row, name)
    return _OF_FIELDS[name].words.get(value, str(value)) if name in _OF_FIELDS else str(value)


def _heading(name: str) -> str:
    """The heading of a column: that of the setting, or its name."""
    setting = _OF_FIELDS.get(name) or SETTINGS.get(name)
    return setting.heading or name if setting is not None else name


def _in_words(name: str, value: Any) -> Any:
    """A value, or the word for it if its setting has one."""
    if name not in SETTINGS or not isinstance(value, (bool, int, float, str)):
        return value
    return SETTINGS[name].words.get(value, value)


def order(rows: Sequence[Record]) -> Callable[[Record], tuple[Any, ...]]:
    """A key that sorts records by the settings in which they differ, and numbers by size."""
    names = list(differing(rows))

    def key(row: Record) -> tuple[Any, ...]:
        values = settings(row)
        return tuple(_natural(values.get(name)) for name in names)

    return key


def _natural(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return (not number, float(value) if number else 0.0, _json(value))


def _words(values: Sequence[Any]) -> list[str] | None:
    """Short words that tell the values of a setting apart, or `None` if there are none."""
    # Of nested settings, show the numbers in which they differ, and texts only if needed.
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
    for names_ in (list(shown), *([name] for name in apart)):
        shown[:] = names_
        found = words()
        if max(map(len, found)) <= _LONGEST and len(set(found)) == distinct:
            return found
    return None


def _leaves(value: Any, before: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; a plain value has the empty name."""
    if not isinstance(value, Mapping):
        return {before: value}
    found = {}
    for name, inner in value.items():
        found |= _leaves(inner, f"{before}.{name}" if before else name)
    return found


def _text(value: Any) -> str:
    """A value in readable form: `SGD(lr=0.1)` for `torch.optim.sgd.SGD(lr=0.1)`."""
    if value is None:
        return _NONE
    if isinstance(value, str):
        value = re.sub(r"(?<![\w.])(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", value)
        return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{4,}\b", r"\1", value)  # a digest
    if isinstance(value, list) and not any(isinstance(part, (list, Mapping)) for part in value):
        return ", ".join(map(_text, value))
    return json.dumps(value)


def _in_full(value: Any) -> str:
    return value if isinstance(value, str) else _NONE if value is None else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
