"""Merges the states of a tracker on several ranks into that of one process that saw everything."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drophot._core import distributed
from drophot._core.user_warnings import warn
from drophot.tracking import deferred_errors, packed_history
from drophot.tracking.deferred_errors import NO_FAULT, NO_TARGET
from drophot.tracking.state import Columns, State
from drophot.tracking.validation import listed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MIN_IDENTICAL_ROWS = 8  # fewer rows may be the same on all ranks by chance


def sync(state: State, group: ProcessGroup | None) -> None:
    """Merge the ranks of a group: concatenate their presentations in the order of the ranks.

    Raises:
        RuntimeError: If the state was loaded before there were ranks.
        ValueError: On all ranks, if one has a fault or two do not agree; or if this rank is
            not in the group.
    """
    if (ranks := distributed.count(group)) < 1:
        raise ValueError(
            "`group` must contain the rank that calls `sync`, and this rank is not in it. Call "
            "`sync` only on the ranks of the group."
        )
    if ranks > 1:
        merged = _merged(state, group)
        # In place: a captured CUDA graph keeps writing to the same memory.
        for name, column in (state.columns | {"targets": state.targets}).items():
            column.copy_(merged[name])
    else:
        state.read()
    state.save_base()


def _merged(state: State, group: ProcessGroup | None) -> Columns:
    unmerged = state.unmerged()
    base = state.base or {n: torch.zeros_like(column) for n, column in state.columns.items()}
    lengths = _check_agreement(state, group, base, len(unmerged))
    # Copies, so that an error below changes nothing.
    merged, targets = {n: column.clone() for n, column in base.items()}, state.targets.clone()
    if not any(lengths):
        return merged | {"targets": targets}
    mine = _select(state.columns | {"targets": targets}, unmerged) | {"index": unmerged}
    first, identical = None, min(lengths) >= _MIN_IDENTICAL_ROWS
    for rows in distributed.gather_tables(mine, lengths, group, state.device):
        first = first or dict(rows)
        identical = identical and all(torch.equal(rows[name], first[name]) for name in rows)
        index = rows.pop("index")
        theirs, known = rows.pop("targets"), targets.index_select(0, index)
        both = (known != NO_TARGET) & (theirs != NO_TARGET)
        clash = (both & (known != theirs)).nonzero()[:, 0]
        if len(clash):
            values = (int(column[clash[0]]) for column in (index, known, theirs))
            raise ValueError(deferred_errors.mismatch(*values))
        targets.index_copy_(0, index, torch.where(known == NO_TARGET, theirs, known))
        # The rows of a sample that no earlier rank has seen are copied, bit for bit.
        before, start = (_select(part, index) for part in (merged, base))
        seen = before["history"] & packed_history.SEEN > 0
        for name, joined in state.join(before, start, rows).items():
            column = rows[name]
            shape = (-1, *(1,) * (column.dim() - 1))
            merged[name].index_copy_(0, index, torch.where(seen.view(shape), joined, column))
    if identical:
        warn(
            f"All {len(lengths)} ranks presented the same samples with the same outcome, and "
            f"each of them is counted. If the ranks share their batches, only one of them "
            f"belongs in `group`; if they do not, give the loader a DistributedSampler. Only "
            f"one rank should `observe` the whole dataset."
        )
    return merged | {"targets": targets}


def _check_agreement(
    state: State, group: ProcessGroup | None, base: Columns, num_rows: int
) -> list[int]:
    """The number of rows of each rank, if the trackers of all ranks agree."""
    numbers = {
        "number of columns": len(state.columns),
        "num_samples": state.num_samples,
        "statistics": zlib.crc32(",".join(state.statistics).encode()),
        "the state that they started from": int(base["history"].sum()),
        "fault": int(state.fault),
        "alone": int(state.loaded_alone),
        "rows": num_rows,
    }
    table = distributed.gather_numbers(list(numbers.values()), group, state.device)
    of = dict(zip(numbers, table.T.tolist(), strict=True))
    state.check(numbers["fault"])
    for name in (
        "number of columns",
        "num_samples",
        "statistics",
        "the state that they started from",
    ):
        if len(set(of[name])) > 1:
            found = (
                f"this rank's are {listed(state.statistics)}"
                if name == "statistics"
                else f"got {of[name]}"
            )
            raise ValueError(
                f"The trackers of all ranks must agree before `sync`, but they differ in "
                f"{name}: {found}. Create equal trackers and load the same state on every rank."
            )
    if any(of["alone"]):
        raise RuntimeError(
            "A state must be loaded after `init_process_group`, so that the tracker knows what "
            "all ranks started from. One rank loaded it before; nothing was merged."
        )
    if wrong := [rank for rank, fault in enumerate(of["fault"]) if fault != NO_FAULT]:
        raise ValueError(
            f"Ranks {wrong} received invalid indices or scores (see the error raised there). "
            f"Nothing was merged."
        )
    return of["rows"]


def _select(columns: Columns, index: Tensor) -> Columns:
    return {name: column.index_select(0, index) for name, column in columns.items()}
