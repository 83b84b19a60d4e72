"""How much of a grid is done, read from its folder."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path

from drophot.records.cells import cell_of
from drophot.report.grid_folder import planned_runs, read_store


def check_folder(folder: Path) -> None:
    """Refuse what is not the folder of a grid."""
    if not (folder / "records.jsonl").is_file():
        problem = "has no records.jsonl" if folder.is_dir() else "is not a folder"
        problem = problem if folder.exists() else "does not exist"
        raise ValueError(
            f"`STORE` must be the folder of a grid, but {folder} {problem}. Name the folder that "
            f"was passed to Grid.run."
        )


def of(folder: Path) -> str:
    """The progress of a grid in a few lines."""
    check_folder(folder)
    grid, lines = read_store(folder)
    # A stage that was computed twice, for example by two processes, has two lines.
    records = list({(cell_of(line), line.seed): line for line in lines}.values())
    planned = max(planned_runs(grid), len(records))
    cells = len({cell_of(record) for record in records})
    rows = {"runs": f"{len(records)} of {planned} done, {cells} cell{'s' * (cells != 1)}"}
    if records:
        for name in ("model", "mode", "seed"):
            counts = Counter(getattr(record, name) for record in records)
            rows[name] = ", ".join(f"{value} ({n})" for value, n in counts.items())
        changed = datetime.fromtimestamp((folder / "records.jsonl").stat().st_mtime)
        rows["last change"] = f"{changed:%Y-%m-%d %H:%M:%S}"
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())
