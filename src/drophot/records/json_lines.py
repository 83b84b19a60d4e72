"""Records as lines of JSON, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from drophot.records.record import Record


def to_line(record: Record) -> str:
    """Convert a record to a line of JSON, without the newline.

    Args:
        record: The record.

    Returns:
        The line, for `from_line`.
    """
    return json.dumps(asdict(record))


def from_line(line: str) -> Record:
    """Convert a line of JSON from `to_line` to a record.

    Args:
        line: The line.

    Returns:
        The record.

    Raises:
        ValueError: If the line does not hold a record.
    """
    try:
        values = json.loads(line)
        values["finetune_curve"] = tuple(values["finetune_curve"])
        _check_types(values)
        return Record(**values)
    except (ValueError, TypeError, KeyError) as error:
        names = ", ".join(f.name for f in fields(Record))
        raise ValueError(
            f"`line` must be a record with the fields {names}, got {line[:40]!r}: {error}."
        ) from error


def _check_types(values: Mapping[str, object]) -> None:
    """Refuse unknown fields, and values of another type than that of their field."""
    known = {f.name: str(f.type) for f in fields(Record)}
    if newer := sorted(values.keys() - known.keys()):
        raise ValueError(
            f"unknown fields {', '.join(newer)}. A newer version of drophot may have written them; "
            f"upgrade to read them"
        )
    for name, value in values.items():
        if not _has_type(known[name], value):
            raise ValueError(f"{name} must be of type {known[name]}, got {value!r}")


def _has_type(kind: str, value: Any) -> bool:
    """Whether a value has a type that is given as the text of an annotation of `Record`."""
    outer, _, inner = kind.rstrip("]").partition("[")
    inner = inner.rpartition(", ")[2] if outer == "dict" else inner.partition(",")[0]
    if outer in ("dict", "tuple"):
        values = value.values() if isinstance(value, dict) else value
        whole = isinstance(value, dict if outer == "dict" else tuple)
        return whole and (not inner or all(_has_type(inner, part) for part in values))
    if outer not in _TYPES:  # Any
        return True
    return isinstance(value, _TYPES[outer]) and (outer == "bool" or not isinstance(value, bool))


_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}


def write(records: Iterable[Record], path: Path | str) -> None:
    """Append records to a file of JSON lines.

    Args:
        records: The records to write.
        path: The file, which is created if it does not exist.
    """
    with Path(path).open("a", encoding="utf-8") as file:
        for record in records:
            file.write(to_line(record) + "\n")


def read(path: Path | str) -> list[Record]:
    """Read the records of a file of JSON lines.

    Args:
        path: The file.

    Returns:
        The records, in the order of the file.

    Raises:
        ValueError: If a line does not hold a record.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write([], f"{folder}/records.jsonl")
        ...     read(f"{folder}/records.jsonl")
        []
    """
    found = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                found.append(from_line(line))
            except ValueError as error:
                raise ValueError(
                    f"`path` must hold a record in each line, and line {number} of {path} does "
                    f"not: {error}"
                ) from error
    return found
