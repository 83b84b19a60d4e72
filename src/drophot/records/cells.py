"""The cells of a grid that records belong to: runs that differ in nothing but the seed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from drophot._core.json_values import Json
from drophot._core.mode_names import BASELINE
from drophot.records.json_lines import to_line
from drophot.records.record import Record, fingerprint
from drophot.settings.tables import RECORD_FIELDS, with_defaults

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


def other_settings(record: Record) -> dict[str, Json]:
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


def known_settings(record: Record) -> dict[str, Json]:
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


def check_names(records: Iterable[Record], argument: str) -> None:
    """Refuse two objects of a user's that records call by the same name."""
    known: dict[tuple[str, Json], Json] = {}
    for record in records:
        for setting, name in RECORD_FIELDS.items():
            value = record.settings.get(setting)
            unused = setting == "mode" and record.mode == BASELINE
            if not isinstance(value, dict) or unused:
                continue
            called = getattr(record, name)
            if not isinstance(called, str):
                continue  # a budget, which has no name: its limits tell it from others
            if known.setdefault((setting, called), value) != value:
                raise ValueError(
                    f"`{argument}` must call different objects by different names, got two of the "
                    f"`{setting}` {called!r} whose code or attributes differ. Give each its own "
                    f"`name`, or rename the records of one: "
                    f"dataclasses.replace(record, {name}={called + '-2'!r})."
                )


def _result(record: Record) -> str:
    """The results of a run as text, in which one nan equals another."""
    plain = replace(record, settings={}, cell="", fingerprint="", seconds={}, coreset="")
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
