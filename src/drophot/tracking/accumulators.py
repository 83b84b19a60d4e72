"""Scores that keep more of a sample's presentations than a mean, and their place in the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from drophot.tracking import packed_history
from drophot.tracking.running_means import RunningMeans
from drophot.tracking.state import Columns

ColumnTypes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Presented(NamedTuple):
    """A batch `(B,)` in the order of its samples, after it was added to the histories.

    `number` says which presentation of its sample a row is, starting at 1. `earlier` and `later`
    count the other rows of the same sample that are before and after it in the batch.
    """

    position: Tensor
    number: Tensor
    earlier: Tensor
    later: Tensor

    @classmethod
    def of(cls, history: Tensor, position: Tensor, repeats: Tensor | None) -> Presented:
        """The rows at ascending positions; `repeats` is that of `packed_history.present`."""
        earlier = later = torch.zeros_like(position)
        if repeats is not None:
            group = torch.zeros_like(position)
            group[1:] = (~repeats).cumsum(0)
            size = torch.zeros_like(position).index_add_(0, group, torch.ones_like(position))
            rows = torch.arange(len(position), device=position.device)
            earlier = rows - (size.cumsum(0) - size).index_select(0, group)
            later = size.index_select(0, group) - 1 - earlier
        total = packed_history.presentations(history.index_select(0, position))
        return cls(position, total - later, earlier, later)


@runtime_checkable
class Accumulator(Protocol):
    """A score whose values are accumulated by the score itself instead of being averaged.

    The columns that its methods receive are named as in `columns`. Those of `join` and `result`
    include the `"history"`.
    """

    @property
    def name(self) -> str: ...

    @property
    def hard_end(self) -> Literal["high", "low"]: ...

    @property
    def num_needed(self) -> int:
        """The number of presentations from which on a sample has a score."""
        ...

    @property
    def columns(self) -> ColumnTypes:
        """The dtype of each column and what follows `N` in its shape. Columns start as zeros."""
        ...

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The values of a batch, `(B,)` or `(B, ...)`."""
        ...

    def add(self, columns: Columns, batch: Presented, values: Tensor) -> None:
        """Add the values of a batch, in place, without waiting for the device."""
        ...

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """As `drophot.tracking.state.join_histories`, for the columns of this score."""
        ...

    def result(self, columns: Columns) -> Tensor:
        """The scores `(N,)`; samples with too few presentations have any value."""
        ...


@dataclass(frozen=True, slots=True)
class Accumulation:
    """The running means and the accumulators of a tracker, as columns of one state."""

    means: RunningMeans
    accumulators: tuple[Accumulator, ...]

    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype of each column and what follows `N` in its shape, for `State`."""
        found = self.means.columns() if self.means.num_values else {}
        for own in self.accumulators:
            found |= {_full(own, name): kind for name, kind in own.columns.items()}
        return found

    def add(
        self,
        columns: Columns,
        position: Tensor,
        repeats: Tensor | None,
        values: Tensor,
        series: list[Tensor],
    ) -> None:
        """Add the `values` of the means and those of each accumulator, in place."""
        if self.means.num_values:
            self.means.add(columns, position, repeats, values)
        if self.accumulators:
            batch = Presented.of(columns["history"], position, repeats)
            for own, of_own in zip(self.accumulators, series, strict=True):
                own.add(_part(own, columns), batch, of_own)

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """As `drophot.tracking.state.join_histories`, for all columns."""
        parts = (before, base, after)
        if self.means.num_values:
            joined = self.means.join(*parts)
        else:
            joined = {"history": packed_history.join(*(part["history"] for part in parts))}
        for own in self.accumulators:
            found = own.join(*(_part(own, part) for part in parts))
            joined |= {_full(own, name): column for name, column in found.items()}
        return joined

    @staticmethod
    def result(own: Accumulator, columns: Columns) -> Tensor:
        """The scores of an accumulator, NaN where a sample was presented too rarely."""
        presented = packed_history.presentations(columns["history"])
        found = own.result(_part(own, columns)).float()
        return torch.where(presented >= own.num_needed, found, torch.nan)


def _full(own: Accumulator, name: str) -> str:
    return f"{own.name}.{name}"  # with a dot, which is in no other column's name


def _part(own: Accumulator, columns: Columns) -> Columns:
    found = {name: columns[_full(own, name)] for name in own.columns}
    return found | {"history": columns["history"]}


def replay(
    own: Accumulator,
    before: Columns,
    base: Columns,
    after: Columns,
    recent: Tensor,
) -> Columns:
    """The columns of `before` to which the values that a rank has seen are added one by one.

    Args:
        own: The score.
        before: As in `Accumulator.join`, like the next two.
        base: As there.
        after: As there.
        recent: The last values of the rank, shape `(n, L, ...)`; that of presentation `t` is at
            `(t - 1) % L`.

    Raises:
        ValueError: If the rank has presented a sample more than `L` times, and another one has
            presented it, too.
    """
    joined = {name: before[name].clone() for name in own.columns}
    start, start_base, end = (
        packed_history.presentations(part["history"]) for part in (before, base, after)
    )
    count, length = end - start_base, recent.shape[1]
    shared = before["history"] & packed_history.SEEN > 0
    if bool(((count > length) & shared).any()):
        raise ValueError(
            f"`sync` must be called before a rank has presented a sample more than {length} times, "
            f"so that {own.name!r} can be merged, but a rank has presented one "
            f"{int(count[shared].max())} times. Call it once per epoch."
        )
    for step in range(min(int(count.max()), length)):
        rows = (count > step).nonzero()[:, 0]
        values = recent[rows, (start_base[rows] + step) % length]
        none = torch.zeros_like(rows)
        own.add(joined, Presented(rows, start[rows] + step + 1, none, none), values)
    return joined
