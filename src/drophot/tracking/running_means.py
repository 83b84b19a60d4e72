"""Running means of values of each sample, with more digits than float32, and sums of squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drophot.tracking import packed_history
from drophot.tracking.state import Columns, join_histories


class _Part(NamedTuple):
    """Some presentations: how many, their means, the digits those lack, and the sums of squares."""

    size: Tensor
    means: Tensor
    tails: Tensor
    squares: list[Tensor]


@dataclass(frozen=True, slots=True)
class RunningMeans:
    """The means of `M` values over the presentations of each sample.

    The columns of a state are `"means"`, float32 `(N, M)`, `"tails"`, int8 `(N, M)`, the digits
    that float32 lacks, and for each value whose spread is kept one of sums of squares `(N,)`.
    """

    num_values: int  # M
    squares: Mapping[str, int]  # each column of sums of squares, and the value it belongs to

    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype of each column and what follows `N` in its shape, for `State`."""
        return {
            "means": (torch.float32, (self.num_values,)),
            **dict.fromkeys(self.squares, (torch.float32, ())),
            "tails": (torch.int8, (self.num_values,)),
        }

    def add(
        self, columns: Columns, position: Tensor, repeats: Tensor | None, values: Tensor
    ) -> None:
        """Add values `(B, M)` of the samples at the ascending positions `(B,)`, in place.

        `repeats` is that of `packed_history.present`. The history counts these values already.
        """
        size = values.new_ones(len(position))
        squares = [torch.zeros_like(size) for _ in self.squares]
        if repeats is not None:
            # The repeats of a sample in the batch form a group: compute the group's mean first.
            group = torch.zeros_like(position)
            group[1:] = (~repeats).cumsum(0)
            size = torch.zeros_like(size).index_add_(0, group, size).index_select(0, group)
            sums = torch.zeros_like(values).index_add_(0, group, values)
            mean = sums.index_select(0, group) / size[:, None]
            apart = values - mean
            squares = [
                zeros.index_add_(0, group, apart[:, value].square()).index_select(0, group)
                for zeros, value in zip(squares, self.squares.values(), strict=True)
            ]
            values = mean
        total = packed_history.presentations(columns["history"].index_select(0, position))
        names = ("means", "tails", *self.squares)
        mean, tail, *before = (columns[name].index_select(0, position) for name in names)
        known = _Part(total - size, mean, _unpacked(mean, tail), before)
        means, tails, squares = self._pool(
            known, _Part(size, values, torch.zeros_like(values), squares)
        )
        # Repeats write the same numbers to the same position.
        for name, column in zip(names, (means, tails, *squares), strict=True):
            columns[name].index_copy_(0, position, column)

    def join(self, before: Columns, base: Columns, after: Columns) -> Columns:
        """As `join_histories`; the rank's values are split into those of the base and the rest."""
        joined = join_histories(before, base, after)
        n, n_base, total = (
            packed_history.presentations(part["history"]) for part in (before, base, after)
        )
        size = total - n_base
        tails, tails_base, tails_after = (
            _unpacked(part["means"], part["tails"]) for part in (before, base, after)
        )
        apart = (after["means"] - base["means"]) + (tails_after - tails_base)
        apart = apart * (total / size)[:, None]
        squares: list[Tensor] = []
        for name, value in self.squares.items():
            between = apart[:, value].square() * n_base * (size / total)
            squares.append((after[name] - base[name] - between).clamp(min=0))
        # Where a mean is infinite, so is the mean of the rest, or no finite number is known for it.
        rest = torch.where(apart.isfinite(), base["means"] + apart, after["means"])
        rest_tails = torch.where(apart.isfinite(), tails_base, 0.0)
        means, packed, squares = self._pool(
            _Part(n, before["means"], tails, [before[name] for name in self.squares]),
            _Part(size, rest, rest_tails, squares),
        )
        named = dict(zip(self.squares, squares, strict=True))
        return joined | {"means": means, "tails": packed} | named

    def _pool(self, before: _Part, after: _Part) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The means, tails (packed) and sums of squares of two parts together.

        Chan, Golub and LeVeque, 1979; for a single new value it is Welford's update.
        """
        share = after.size / (before.size + after.size)
        apart = (after.means - before.means) + (after.tails - before.tails)
        squares = [
            old + (new + apart[:, value].square() * before.size * share)
            for old, new, value in zip(
                before.squares, after.squares, self.squares.values(), strict=True
            )
        ]
        step = apart * share[:, None]
        # The sum and its rounding error (Knuth's TwoSum). Without the error, a mean of thousands of
        # values would no longer move.
        rough = before.means + step
        lost = rough - before.means
        lost = (before.means - (rough - lost)) + (step - lost)
        tails = before.tails + lost
        means = rough + tails
        tails = tails - (means - rough)
        # A mean that is infinite stays infinite; two different infinities have no mean.
        beyond = before.means + after.means
        beyond = torch.where(before.size[:, None] > 0, beyond, after.means)
        means = torch.where(beyond.isfinite(), means, beyond)
        return means, _packed(means, tails), squares


def _packed(means: Tensor, tails: Tensor) -> Tensor:
    """The digits that a mean lacks, at most half of its last bit, in 8 bits."""
    return (tails / _unit(means)).nan_to_num(0, 0, 0).round().clamp(-127, 127).to(torch.int8)


def _unpacked(means: Tensor, tails: Tensor) -> Tensor:
    return torch.where(tails != 0, tails * _unit(means), 0.0)


def _unit(means: Tensor) -> Tensor:
    return means.abs() * 2.0**-31  # half of the last bit is at most 2 ** -24, or 127 of these
