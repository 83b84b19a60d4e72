"""Which runs are of one cell: those that were asked for alike, the seed apart."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from drophot.records import Record, fingerprint, to_line
from drophot.settings import SAMPLING_MODES

FIELDS = (
    *("model", "protocol", "mode", "keep_ratio", "prune_ratio", "equal_steps", "reinitialized"),
    *("rewound", "recalibrated", "schedule", "scope", "structured"),
)
"""What a record says of its cell in fields of its own."""

# Settings that a record names otherwise. A record's "model" is its name alone.
_NAMES = {
    "model": "network",
    "data_ratio": "keep_ratio",
    "reinitialize": "reinitialized",
    "rewind": "rewound",
    "recalibrate_bn": "recalibrated",
}
STEP_1 = {"forgetting", "score_epochs"}
"""Settings that only step 1 goes by."""
_NO_STEP_1 = ("baseline", "random", "random-balanced", *SAMPLING_MODES)


def others(record: Record) -> dict[str, Any]:
    """The settings that are none of `FIELDS`; of an old record, what it shows of them."""
    if not record.settings:
        known = {"finetune_epochs": len(record.finetune_curve), "test_samples": record.test_samples}
        return {name: value for name, value in known.items() if name != "test_samples" or value}
    renamed = {_NAMES.get(name, name): value for name, value in record.settings.items()}
    return {name: value for name, value in renamed.items() if name not in FIELDS}


def known(record: Record) -> dict[str, Any]:
    """The same, and its cell where that is all that is known."""
    return others(record) | ({"cell": record.cell} if record.cell and not record.settings else {})


def key(record: Record, free: Collection[str] = ()) -> tuple[object, ...]:
    """What a record shares with all that were asked for alike, but for the settings in `free`."""
    fields = [getattr(record, name) for name in FIELDS if name not in free]
    rest = {name: value for name, value in others(record).items() if name not in free}
    return (*fields, fingerprint(rest))


def independent_of(mode: str) -> set[str]:
    """The settings that a reference of this mode may differ in from what is compared with it."""
    found = {"mode"}
    if mode == "baseline":  # sees every sample, whatever share was asked for and however many steps
        found |= {"keep_ratio", "equal_steps"}
    if mode in _NO_STEP_1:
        found |= STEP_1
    return found


def cells(records: Iterable[Record], name: str = "records") -> list[list[Record]]:
    """Put the runs of each cell together, in the order in which each cell first appears.

    A baseline is one whatever mode it was asked for with. A run that is there twice counts once.

    Returns:
        The cells, each with a run for each seed.

    Raises:
        TypeError: If one is no record.
        ValueError: If there are none, or two runs of one cell and seed found different things.
    """
    found: dict[tuple[object, ...], dict[int, Record]] = {}
    for record in checked(records, name):
        runs = found.setdefault(identity(record), {})
        first = runs.setdefault(record.seed, record)
        if first is not record and _found(first) != _found(record):
            devices = dict.fromkeys(run.device for run in (first, record))
            where = f" on {' and '.join(devices)}" * (len(devices) > 1)
            raise ValueError(
                f"`{name}` should hold each seed of a cell once. Found seed {record.seed} twice in "
                f"{cell_words(record)}, with different results{where}; keep one of the two."
            )
    if not found:
        raise ValueError(f"`{name}` must hold at least one record, but it is empty.")
    return [list(runs.values()) for runs in found.values()]


def pairs(records: Iterable[Record], against: str) -> list[list[tuple[Record, Record]]]:
    """The runs of each cell, each with the run of its seed of the cell's reference.

    Returns:
        The cells that share a seed with their reference; not those of its mode, nor the baseline.

    Raises:
        TypeError: If a record is none.
        ValueError: If `cells` finds a fault, or there are no records of the reference.
    """
    groups = cells(records)
    modes = dict.fromkeys(runs[0].mode for runs in groups)
    if against not in modes:
        raise ValueError(
            f"`against` should be a mode of the records. Found {against!r}; the modes of the "
            f"records are {', '.join(modes)}. Add the records of the reference, or choose another."
        )
    loose = independent_of(against)
    # What was scored alike comes before what merely need not have been. The first run counts.
    frees = (loose - STEP_1, loose)
    references: dict[object, dict[int, Record]] = {}
    for runs in groups:
        for free in frees if runs[0].mode == against else ():
            reference = references.setdefault((len(free), key(runs[0], free)), {})
            for run in runs:
                reference.setdefault(run.seed, run)
    found = []
    for runs in groups:
        if runs[0].mode in (against, "baseline"):
            continue
        strict, lax = (references.get((len(f), key(runs[0], f)), {}) for f in frees)
        seeds = {**lax, **strict}
        paired = [(run, seeds[run.seed]) for run in runs if run.seed in seeds]
        if paired:
            found.append(sorted(paired, key=lambda pair: pair[0].seed))
    return found


def identity(record: Record) -> tuple[object, ...]:
    """The same for all seeds of a cell, and for nothing else."""
    fields = tuple(getattr(record, name) for name in FIELDS)
    if record.cell and record.mode != "baseline":
        return (*fields, record.cell)
    return (*key(record), record.kept, "" if record.settings else record.cell)


def checked(records: Iterable[Record], name: str) -> list[Record]:
    """The records, if they are some."""
    if isinstance(records, (str, Path)):
        raise TypeError(
            f"`{name}` should be records. Found the path {str(records)!r}; read a file of them "
            f"with drophot.records.read, a grid's folder from its records.jsonl."
        )
    if isinstance(records, Record) or not isinstance(records, Iterable):
        raise TypeError(f"`{name}` should be a list of records. Found {type(records).__name__}.")
    found = list(records)
    for record in found:
        if not isinstance(record, Record):
            raise TypeError(
                f"`{name}` should be records, as DropHot.run and Grid.run give them. Found "
                f"{record!r:.80}."
            )
    return found


def cell_words(record: Record) -> str:
    """A cell in words, for errors."""
    cell = f", cell {record.cell}" if record.cell else ""
    return (
        f"{record.model}: {record.mode}, keep_ratio {record.keep_ratio}, prune_ratio "
        f"{record.prune_ratio}{cell}"
    )


def _found(record: Record) -> str:
    """What a run found, as text, in which one nan equals another."""
    plain = replace(record, settings={}, cell="", fingerprint="", seconds={})
    return json.dumps(json.loads(to_line(plain)), sort_keys=True)
