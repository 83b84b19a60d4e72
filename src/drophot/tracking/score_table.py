"""The columns of a tracker as a CSV file, and their most suspicious rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from torch import Tensor

from drophot._core.atomic_write import atomic_write

if TYPE_CHECKING:
    from drophot.tracking.dynamics import DynamicsTracker


def most_suspicious(tracker: DynamicsTracker, statistic: str, number: int) -> np.ndarray:
    """The samples that a statistic finds hardest, the hardest first.

    Samples that were never presented are left out. The label of a hard sample may be wrong.

    Raises:
        ValueError: If the tracker does not keep the statistic, or no sample has a score.
    """
    if statistic not in tracker.statistics:
        names = ", ".join(map(repr, tracker.statistics))
        raise ValueError(f"`statistic` must be one of {names}, got {statistic!r}.")
    scores = tracker.scores(statistic, missing="nan").cpu().numpy()
    if tracker.statistics[statistic].hard_end == "high":
        scores = -scores
    if np.isnan(scores).all():
        most = int(tracker.presentations.max())
        if most == 0:
            raise ValueError("`tracker` must have presented samples, got one that has seen none.")
        raise ValueError(
            f"`tracker` must have a {statistic!r} for at least one sample, got NaN for all. No "
            f"sample was presented more than {most} times."
        )
    order = np.argsort(scores, kind="stable")  # NaNs come last
    return order[: min(number, int((~np.isnan(scores)).sum()))]


def write_csv(
    file: TextIO,
    columns: Mapping[str, np.ndarray],
    *,
    ids: Sequence[object] | None = None,
    rows: Iterable[int] | None = None,
) -> None:
    """Write columns of the same length, all rows or some."""
    parts = [column.tolist() if column.dtype.kind != "f" else column for column in columns.values()]
    names = list(columns)
    if ids is not None:
        names, parts = ["id", *names], [ids, *parts]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    every = range(len(next(iter(columns.values())))) if rows is None else rows
    writer.writerows([part[row] for part in parts] for row in every)


def save_csv(path: Path, columns: Mapping[str, np.ndarray], ids: Iterable[object] | None) -> None:
    """Write all rows to a file, whole or not at all."""
    # A list, because a pandas Series is indexed by its labels.
    ids = None if ids is None else _checked_ids(ids, len(columns["index"]))
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        write_csv(text, columns, ids=ids)
        text.detach()  # flushes, and leaves the file open


def _checked_ids(ids: Iterable[object], num_samples: int) -> list[object]:
    if isinstance(ids, str | bytes | set | frozenset):
        what = "a set, which has no order" if isinstance(ids, set | frozenset) else repr(ids)
        raise TypeError(f"`ids` must be a list of names, one for each sample, got {what}.")
    found = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if len(found) != num_samples:
        raise ValueError(
            f"`ids` must have one value for each of the {num_samples} samples, got {len(found)}. "
            f"Pass those of the whole dataset, in its order."
        )
    samples: dict[str, int] = {}
    for sample, value in enumerate(found):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"`ids` must name each sample, got {value} for sample {sample}.")
        first = samples.setdefault(str(value), sample)
        if first != sample:
            raise ValueError(
                f"`ids` must be different, got {value!r} for the samples {first} and {sample}."
            )
    return found
