"""Read the folder of a grid, which may still be running."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drophot.records.json_lines import from_line
from drophot.records.record import Record


def read_store(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """The `grid.json` and the records of the folder of a grid."""
    path = folder / "records.jsonl"
    if not path.is_file():
        raise ValueError(
            f"`source` must be records or the folder of a grid, got {folder}, which has no "
            f"records.jsonl. Pass the folder that was passed to Grid.run."
        )
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # the rest is a line that is being written
    records = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            records.append(from_line(line.decode()))
        except ValueError as error:
            raise ValueError(
                f"{path} must hold records, but line {number} does not: {error}"
            ) from error
    return _read_grid(folder / "grid.json"), records


def planned_runs(grid: Mapping[str, Any]) -> int:
    """The number of runs of a grid by its `grid.json`, or 0 if it does not say."""
    plan = grid.get("plan", {})
    return plan.get("runs", plan.get("cells", 0))  # as older versions called them


def _read_grid(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, but does not: {error}") from error
    plan = found.get("plan", {}) if isinstance(found, dict) else None
    if not isinstance(plan, dict) or not isinstance(planned_runs(found), int):
        raise ValueError(f"{path} must be the description of a grid, as Grid.run writes it.")
    return found
