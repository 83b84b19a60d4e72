"""The samples of a tracker's checkpoint that are most likely mislabeled, as CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from drophot._command_line import checkpoints
from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.score_table import most_suspicious, write_csv
from drophot.tracking.statistics import DEFAULT


def write(path: Path, score: str, number: int, key: str | None, file: TextIO) -> None:
    """Write a row for each of the most suspicious samples, the most suspicious first."""
    if number < 1:
        raise ValueError(f"`--number` must be at least 1, got {number}.")
    state = checkpoints.find(path, _is_state, key, "`state_dict` of a DynamicsTracker")
    tracker = _tracker(state)
    if score not in tracker.statistics:
        names = ", ".join(map(repr, tracker.statistics))
        raise ValueError(f"`--score` must be one of {names}, got {score!r}.")
    rows = most_suspicious(tracker, score, number)
    write_csv(file, tracker.columns(), rows=rows)


def _is_state(found: Mapping[str, Any]) -> bool:
    names = found.get("statistics", DEFAULT)
    history = found.get("history")
    return (
        isinstance(history, Tensor)
        and history.ndim == 1
        and found.keys() >= {"version", "targets"}
        and isinstance(names, (list, tuple))
        and all(isinstance(name, str) for name in names)
    )


def _tracker(state: Mapping[str, Any]) -> DynamicsTracker:
    if "means" not in state:
        raise ValueError(
            "The file holds the state of a ForgettingTracker, and forgetting counts do not find "
            "wrong labels: a sample that is never correct is never forgotten. Track with a "
            "DynamicsTracker."
        )
    names = state.get("statistics", DEFAULT)
    if own := [name.partition("=")[0] for name in names if name not in DEFAULT]:
        raise ValueError(
            f"The tracker has statistics that are not built in: {', '.join(map(repr, own))}. "
            f"Create it in Python as for the training, load the state, and write it with "
            f"`tracker.to_csv(path)`."
        )
    tracker = DynamicsTracker(len(state["history"]), statistics=names)
    tracker.load_state_dict(state)
    return tracker
