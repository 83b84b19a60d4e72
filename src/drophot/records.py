"""The result of a run, its JSON lines, and the cells that runs with different seeds belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from drophot.settings import (
    BASELINE,
    RECORD_FIELDS,
    SAMPLING_MODES,
    SCORING_ONLY,
    Mode,
    with_defaults,
)

__all__ = ["Record", "fingerprint", "from_line", "read", "to_line", "write"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The result of one run of the five steps.

    Accuracies are on the test set, in [0, 1], each after the last epoch of its step, never after
    the best one. Two records are equal if everything but their seconds is equal.
    `pandas.DataFrame(records)` gives a row for each.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from drophot import DropHot
        >>> from drophot.models import fcnet
        >>> data = TensorDataset(torch.eye(8), torch.arange(8) % 2)
        >>> model = partial(fcnet, in_features=8, hidden=4, num_classes=2)
        >>> settings = dict(data_ratio=0.5, mode="random", prune_ratio=0.5)
        >>> record = DropHot(model, data, data, **settings).run()
        >>> record.mode, record.num_kept, record.sparsity
        ('random', 4, 0.5)
        >>> record.finetuned_accuracy == record.finetune_curve[-1]
        True
        >>> from_line(to_line(record)) == record
        True
    """

    model: str
    """The name of the network."""
    mode: str
    """How the kept samples were chosen: the name of the mode, or "baseline" if all were kept."""
    keep_ratio: float
    """The share of training samples to keep, as requested."""
    num_kept: int
    """The number of training samples kept, `K`; per epoch for a mode that reselects samples."""
    prune_ratio: float
    """The share of prunable weights to remove, as requested."""
    seed: int
    """The seed of initialization, order and ties."""
    trained_accuracy: float
    """After training on the coreset, before pruning."""
    pruned_accuracy: float
    """Right after pruning; with a schedule, right after its first pruning."""
    finetuned_accuracy: float
    """After fine-tuning on the full training set: the last entry of the curve."""
    finetune_curve: tuple[float, ...]
    """After each epoch of fine-tuning."""
    sparsity: float
    """The share of prunable weights that are zero or removed after fine-tuning, as counted in the
    network. Matrices that are not prunable do not count; `DropHot` warns if they hold more than 1 %
    of the weights."""
    seconds: dict[str, float] = field(compare=False)
    """Wall-clock seconds of each step that was needed. If the baseline of a grid is the network of
    step 1, it has the seconds of "score" and none of "train"."""
    device: str
    """The device of the run."""
    versions: dict[str, str]
    """The versions of drophot, torch, NumPy and Python."""
    fingerprint: str
    """The fingerprint of the whole configuration, seed and ratios included: see `fingerprint`."""
    protocol: str = "paper"
    """The protocol: "paper", "released" for what the paper's released code does instead, or the
    name of another one."""
    equal_steps: bool = False
    """Whether training on the coreset took as many optimizer steps as on the full training set."""
    reinitialized: bool = False
    """Whether the pruned network was fine-tuned from new random weights."""
    rewound: bool = False
    """Whether the pruned network was fine-tuned from the weights that training started with."""
    recalibrated: bool = False
    """Whether the statistics of BatchNorm were recomputed after pruning."""
    schedule: str = "one-shot"
    """How pruning was spread over fine-tuning: "one-shot", "gradual" or "iterative"."""
    scope: str = "layer"
    """How the removed share was divided among the layers."""
    structured: bool = False
    """Whether channels were removed, in which case `prune_ratio` is the share of channels."""
    parameters: int = 0
    """The number of parameters of the final network, zeros included; 0 in older records."""
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    """The whole configuration without the seed, as JSON holds it; empty in older records."""
    cell: str = field(default="", compare=False)
    """The fingerprint of `settings`, which is the same for all seeds of a cell of a grid."""
    test_samples: int = 0
    """The size of the test set, or 0 if it is unknown."""


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """Compute a short name for a configuration that is equal if the configurations are equal.

    Args:
        configuration: Names and values that JSON can hold. The order of the names does not matter.

    Returns:
        16 hexadecimal digits: the start of the SHA-256 of the canonical JSON.

    Raises:
        TypeError: If JSON cannot hold a value.

    Example:
        >>> fingerprint({"seed": 0, "ratio": 0.5}) == fingerprint({"ratio": 0.5, "seed": 0})
        True
    """
    text = json.dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _check_types(values: Mapping[str, Any]) -> None:
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


# A cell of a grid is a configuration without the seed. Older records do not hold their
# configuration; their fields are used instead.

CELL_FIELDS = ("model", *(own for name, own in RECORD_FIELDS.items() if name != "seed"))
"""The fields of a record that hold a setting of its cell."""


def cell_of(record: Record) -> tuple[object, ...]:
    """A key that is equal for all seeds of a cell, and for nothing else."""
    # A baseline is the same cell whatever mode was requested, because it keeps all samples.
    if record.cell and record.mode != BASELINE:
        return (*(getattr(record, name) for name in CELL_FIELDS), record.cell)
    return (*shared_settings(record), record.num_kept, "" if record.settings else record.cell)


def shared_settings(record: Record, ignoring: Collection[str] = ()) -> tuple[object, ...]:
    """A key that is equal for records with the same settings, except those to ignore."""
    own = [getattr(record, name) for name in CELL_FIELDS if name not in ignoring]
    rest = {n: value for n, value in other_settings(record).items() if n not in ignoring}
    return (*own, fingerprint(rest))


def other_settings(record: Record) -> dict[str, Any]:
    """The settings that no field of a record holds; of an older record, what its fields show."""
    if not record.settings:
        known = {"finetune_epochs": len(record.finetune_curve), "test_samples": record.test_samples}
        return {name: value for name, value in known.items() if name != "test_samples" or value}
    whole = with_defaults(record.settings)
    renamed = {_IN_RECORDS.get(name, name): value for name, value in whole.items()}
    if record.mode == BASELINE:
        renamed.pop("mode", None)  # all modes keep all samples
    # A field holds only the name of a user's object, which has a code and a state too.
    return {n: v for n, v in renamed.items() if n not in CELL_FIELDS or isinstance(v, dict)}


def known_settings(record: Record) -> dict[str, Any]:
    """The same, with the fingerprint of the cell if the settings themselves are not known."""
    cell = {"cell": record.cell} if record.cell and not record.settings else {}
    return other_settings(record) | cell


# The configuration of the model is more than its name, which the field `model` holds.
_IN_RECORDS = {"model": "network", **RECORD_FIELDS}


def group_by_cell(records: Iterable[Record], argument: str = "records") -> list[list[Record]]:
    """Group records by cell, in the order in which each cell first appears.

    Args:
        records: The records. A run that is given twice counts once.
        argument: The name of the argument in errors.

    Returns:
        The cells, each with one record for each seed.

    Raises:
        TypeError: If an item is not a record.
        ValueError: If there are no records, or two records of the same cell and seed differ.
    """
    found: dict[tuple[object, ...], dict[int, Record]] = {}
    for record in check_records(records, argument):
        runs = found.setdefault(cell_of(record), {})
        first = runs.setdefault(record.seed, record)
        if first is not record and _result(first) != _result(record):
            devices = dict.fromkeys(run.device for run in (first, record))
            where = f" on {' and '.join(devices)}" * (len(devices) > 1)
            cell = f", cell {record.cell}" if record.cell else ""
            raise ValueError(
                f"`{argument}` must hold each seed of a cell once, got seed {record.seed} twice in "
                f"{record.model}: {record.mode}, keep_ratio {record.keep_ratio}, prune_ratio "
                f"{record.prune_ratio}{cell}, with different results{where}. Remove one of the two."
            )
    if not found:
        raise ValueError(f"`{argument}` must hold at least one record, got none.")
    return [list(runs.values()) for runs in found.values()]


def _result(record: Record) -> str:
    """The results of a run as text, in which one nan equals another."""
    plain = replace(record, settings={}, cell="", fingerprint="", seconds={})
    return json.dumps(json.loads(to_line(plain)), sort_keys=True)


def check_records(records: Iterable[Record], argument: str) -> list[Record]:
    """The records as a list, if all of them are records."""
    if isinstance(records, (str, Path)):
        raise TypeError(
            f"`{argument}` must be records, got the path {str(records)!r}. Read a file of records "
            f"with drophot.records.read; that of a grid is records.jsonl in its folder."
        )
    if isinstance(records, Record) or not isinstance(records, Iterable):
        raise TypeError(f"`{argument}` must be a list of records, got {type(records).__name__}.")
    found = list(records)
    for record in found:
        if not isinstance(record, Record):
            raise TypeError(
                f"`{argument}` must hold records, as DropHot.run and Grid.run return them, got "
                f"{record!r:.80}."
            )
    return found


def pairs(records: Iterable[Record], against: str | Mode) -> list[list[tuple[Record, Record]]]:
    """Pair the runs of each cell with the runs of its reference that have the same seed.

    Args:
        records: The records.
        against: The mode of the references, as an object or by its name.

    Returns:
        The pairs of each cell. Left out are the cells that share no seed with their reference,
        those that have the mode of the reference, and the baseline.

    Raises:
        TypeError: If an item is not a record, or `against` is not a mode.
        ValueError: If `group_by_cell` raises one, or no record has the mode `against`.
    """
    groups = group_by_cell(records)
    mode = mode_name(against)
    modes = dict.fromkeys(runs[0].mode for runs in groups)
    if mode not in modes:
        raise ValueError(
            f"`against` must be a mode of the records, got {mode!r}. The modes of the records are "
            f"{', '.join(modes)}. Add the records of the reference, or choose another one."
        )
    free = free_settings(against)
    # References that were scored alike take precedence. Of several, the first counts.
    precedence = (free - SCORING_ONLY, free)
    references: list[dict[object, dict[int, Record]]] = [{}, {}]
    for runs in groups:
        if runs[0].mode == mode:
            for by_settings, ignored in zip(references, precedence, strict=True):
                by_seed = by_settings.setdefault(shared_settings(runs[0], ignored), {})
                for run in runs:
                    by_seed.setdefault(run.seed, run)
    found = []
    for runs in groups:
        if runs[0].mode in (mode, BASELINE):
            continue
        alike, scored_otherwise = (
            by_settings.get(shared_settings(runs[0], ignored), {})
            for by_settings, ignored in zip(references, precedence, strict=True)
        )
        by_seed = {**scored_otherwise, **alike}
        paired = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]
        if paired:
            found.append(sorted(paired, key=lambda pair: pair[0].seed))
    return found


def mode_name(mode: str | Mode, argument: str = "against") -> str:
    """The name by which records call a mode."""
    name = mode if isinstance(mode, str) else getattr(mode, "name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"`{argument}` must be a mode or the name of one, got {mode!r:.80}. Pass a name such "
            f'as "random", or an object with a `name`.'
        )
    return name


def free_settings(mode: str | Mode) -> frozenset[str]:
    """The settings in which a reference of a mode may differ from what is compared with it."""
    free = {"mode"}
    if mode == BASELINE:  # it keeps all samples, whatever share and number of steps are requested
        free |= {"keep_ratio", "equal_steps"}
    needs = getattr(mode, "needs", None)
    if needs is None:
        scored = mode_name(mode) not in _WITHOUT_SCORING
    else:
        scored = not {"scores", "model"}.isdisjoint(needs)
    return frozenset(free if scored else free | SCORING_ONLY)


_WITHOUT_SCORING = {BASELINE, "random", "random-balanced", *SAMPLING_MODES}
