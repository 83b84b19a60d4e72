"""The samples of a tracker's checkpoint that are most likely mislabeled, as CSV."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from drophot._command_line import checkpoints
from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.score_labels import name_in, score_of
from drophot.tracking.score_table import most_suspicious, write_csv
from drophot.tracking.statistics import DEFAULT


def write(path: Path, score: str, number: int, key: str | None, file: TextIO) -> None:
    """Write a row for each of the most suspicious samples, the most suspicious first."""
    if number < 1:
        raise ValueError(f"`--number` must be at least 1, got {number}.")

    def keeps_score(state: checkpoints.State) -> bool:
        return _is_of_dynamics(state) and score in map(name_in, _labels(state))

    what = "`state_dict` of a DynamicsTracker"
    tracker = _tracker(checkpoints.find(path, _is_state, key, what, keeps_score))
    if score not in tracker.statistics:
        names = ", ".join(map(repr, tracker.statistics))
        chosen = "" if key is None else f" --key {key}"
        raise ValueError(
            f"`--score` must be one of {names}, got {score!r}. For example: `drophot suspects "
            f"{shlex.quote(str(path))}{chosen} --score {next(iter(tracker.statistics))}`."
        )
    rows = most_suspicious(tracker, score, number)
    write_csv(file, tracker.columns(), rows=rows)


def _is_state(found: Mapping[str, Any]) -> bool:
    history, names = found.get("history"), _labels(found)
    return (
        isinstance(history, Tensor)
        and history.ndim == 1
        and found.keys() >= {"version", "targets"}
        and isinstance(names, (list, tuple))
        and all(isinstance(name, str) for name in names)
    )


def _labels(state: Mapping[str, Any]) -> Any:
    return state.get("statistics", DEFAULT)


def _is_of_dynamics(state: Mapping[str, Any]) -> bool:
    """Whether a tracker keeps more than the history of each sample."""
    return "means" in state or "statistics" in state


def _tracker(state: Mapping[str, Any]) -> DynamicsTracker:
    if not _is_of_dynamics(state):
        raise ValueError(
            "The file holds the state of a ForgettingTracker, and forgetting counts do not find "
            "wrong labels: a sample that is never correct is never forgotten. Track with a "
            "DynamicsTracker."
        )
    scores = {name_in(label): score_of(label) for label in _labels(state)}
    if own := [name for name, score in scores.items() if score is None]:
        raise ValueError(
            f"The tracker has scores of your own: {', '.join(map(repr, own))}. Create it in Python "
            f"as for the training, load the state, and write it with `tracker.to_csv(path)`."
        )
    statistics = [score for score in scores.values() if score is not None]
    tracker = DynamicsTracker(len(state["history"]), statistics=statistics)
    tracker.load_state_dict(state)
    return tracker
