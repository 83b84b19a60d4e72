"""What a run found, and with which configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The result of one run of the five steps.

    Accuracies are on the test set, in [0, 1], each after the last epoch of its step, never the
    best one. Two records are equal if all but the seconds are; `pandas.DataFrame(records)` gives a
    row for each.

    Example:
        >>> from functools import partial
        >>> from torch.utils.data import TensorDataset
        >>> from drophot import DropHot
        >>> from drophot.models import fcnet
        >>> data = TensorDataset(torch.eye(8), torch.arange(8) % 2)
        >>> model = partial(fcnet, in_features=8, hidden=4, num_classes=2)
        >>> settings = dict(data_ratio=0.5, mode="random", prune_ratio=0.5)
        >>> record = DropHot(model, data, data, **settings).run()
        >>> record.mode, record.kept, record.sparsity
        ('random', 4, 0.5)
        >>> record.finetuned_accuracy == record.finetune_curve[-1]
        True
    """

    model: str
    """The network's name."""
    mode: str
    """How was chosen what was kept: "high", "low", "random" or another mode's name; "baseline"
    where that is everything."""
    keep_ratio: float
    """The share of training samples asked for."""
    kept: int
    """The number of training samples kept, `K`; in each epoch, where the mode chooses anew."""
    prune_ratio: float
    """The share of prunable weights asked to be removed."""
    seed: int
    """The seed of initialisation, order and ties."""
    trained_accuracy: float
    """After training on the coreset, before pruning."""
    pruned_accuracy: float
    """Right after pruning; with a schedule, after its first."""
    finetuned_accuracy: float
    """After fine-tuning on the full training set: the curve's last entry."""
    finetune_curve: tuple[float, ...]
    """After each fine-tuning epoch."""
    sparsity: float
    """The share of prunable weights that is zero, or gone, after fine-tuning, counted in them.
    Matrices that are not prunable do not count: `DropHot` warns if they are more than 1 %."""
    seconds: dict[str, float] = field(compare=False)
    """Wall-clock seconds of each step; a step that was not needed is missing. Where a grid's
    baseline is the network of step 1, it has the seconds of "score" and no "train"."""
    device: str
    """Where it ran."""
    versions: dict[str, str]
    """Of drophot, torch, NumPy and Python."""
    fingerprint: str
    """Of everything that was asked for, the seed and the ratios included: see `fingerprint`."""
    protocol: str = "paper"
    """The paper's text, "paper", or "released", what its released code does instead."""
    equal_steps: bool = False
    """Whether the coreset got as many optimiser steps as the full training set would have."""
    reinitialized: bool = False
    """Whether what pruning left was fine-tuned from new random weights."""
    rewound: bool = False
    """Whether what pruning left was fine-tuned from the weights that training began with."""
    recalibrated: bool = False
    """Whether BatchNorm's statistics were taken anew after pruning."""
    schedule: str = "one-shot"
    """How pruning was spread over fine-tuning: "one-shot", "gradual" or "iterative"."""
    scope: str = "layer"
    """How the share removed was divided among the layers."""
    structured: bool = False
    """Whether channels were removed, of which `prune_ratio` is the share."""
    parameters: int = 0
    """Those of the network in the end, zeros included; 0 in records of before this was counted."""
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    """The whole configuration that `fingerprint` is of, as JSON can hold it, without the seed;
    empty in records of before this was kept."""
    cell: str = field(default="", compare=False)
    """The fingerprint of `settings`, the same for all seeds: what a row of a table is."""
    test_samples: int = 0
    """The size of the test set, whose counts accuracies are; 0 where it is not known."""


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """A short name for a configuration: equal if and only if the configurations are.

    Args:
        configuration: Anything JSON can hold, by name; the order of the names does not matter.

    Returns:
        16 hexadecimal digits: the start of the SHA-256 of the canonical JSON.

    Raises:
        TypeError: If a value is not one that JSON can hold.

    Example:
        >>> fingerprint({"seed": 0, "ratio": 0.5}) == fingerprint({"ratio": 0.5, "seed": 0})
        True
    """
    text = json.dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_line(record: Record) -> str:
    """A record as a line of JSON, without the line's end.

    Args:
        record: The record.

    Returns:
        The line.
    """
    return json.dumps(asdict(record))


def from_line(line: str) -> Record:
    """The record of a line of JSON.

    Args:
        line: What `to_line` gave.

    Returns:
        The record.

    Raises:
        ValueError: If it is no record.
    """
    try:
        values = json.loads(line)
        values["finetune_curve"] = tuple(values["finetune_curve"])
        _check(values)
        return Record(**values)
    except (ValueError, TypeError, KeyError) as error:
        names = ", ".join(f.name for f in fields(Record))
        raise ValueError(
            f"`line` should be a record, with the fields {names}. Found {line[:40]!r}: {error}."
        ) from error


def _check(values: Mapping[str, Any]) -> None:
    """Refuse fields that are unknown, and values of another type than their field's."""
    known = {f.name: str(f.type) for f in fields(Record)}
    if newer := sorted(values.keys() - known.keys()):
        raise ValueError(
            f"unknown fields {', '.join(newer)}, which a newer drophot may have written; upgrade "
            f"to read them"
        )
    for name, value in values.items():
        if not _is_of(known[name], value):
            raise ValueError(f"{name} should be of type {known[name]}, not {value!r}")


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value is of a field's type, as it is written in the class."""
    outer, _, inner = kind.rstrip("]").partition("[")
    inner = inner.rpartition(", ")[2] if outer == "dict" else inner.partition(",")[0]
    if outer in ("dict", "tuple"):
        values = value.values() if isinstance(value, dict) else value
        whole = isinstance(value, dict if outer == "dict" else tuple)
        return whole and (not inner or all(_is_of(inner, part) for part in values))
    if outer not in _TYPES:  # Any
        return True
    return isinstance(value, _TYPES[outer]) and (outer == "bool" or not isinstance(value, bool))


_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}


def write(records: Iterable[Record], path: Path | str) -> None:
    """Append records to a file of JSON lines.

    Args:
        records: What to write.
        path: The file; made if it is not there.
    """
    with Path(path).open("a", encoding="utf-8") as file:
        for record in records:
            file.write(to_line(record) + "\n")


def read(path: Path | str) -> list[Record]:
    """Read the records of a file of JSON lines.

    Args:
        path: The file.

    Returns:
        The records, in the file's order.

    Raises:
        ValueError: If a line is not a record.

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
                    f"`{path}` must hold a record in each line. Line {number} is not a record: "
                    f"{error}"
                ) from error
    return found
