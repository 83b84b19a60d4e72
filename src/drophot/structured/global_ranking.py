"""One order in which the channels of all layers are removed.

Channels are removed in steps: one channel of a set of channels that are ranked together, or one of
each head or group that has to lose equally many, or as many as `round_to` demands. A step has the
value

    sensitivity · N · I / S

where I is the mean score of its channels, N the number of channels in their set, and S the sum of
the scores of the channels that are still there before it. N · I / S is the relative score of
DepGraph (Fang et al. 2023, section 3.3), with the sum over the remaining channels as in LAMP (Lee
et al. 2021). It depends neither on the scale nor on the width of a layer, and it increases as a
layer shrinks, so that no layer is emptied before the others are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from drophot._core.budget import Budget
from drophot.structured.channel_groups import ChannelGroups


@dataclass(frozen=True, slots=True)
class RankedSet:
    """The steps that remove the channels of one set, or of several that lose equally many."""

    steps: list[Tensor]  # the channels of each step, in order
    values: list[float]  # of the steps, without the sensitivity, ascending

    def half(self) -> Tensor:
        """The channels of the first half of the steps, at least one step."""
        return torch.cat(self.steps[: ceil(len(self.steps) / 2)])


def ranked_sets(groups: ChannelGroups, scores: Tensor, budget: Budget) -> list[RankedSet]:
    """The sets of channels that can be removed, and the order within each.

    Args:
        groups: The channels.
        scores: The score of each channel, `(channels,)`.
        budget: Its `min_kept` and `round_to` limit the steps.
    """
    widths, sizes, every = groups.widths(), torch.bincount(groups.group), groups.steps()
    found = []
    for linked in _linked(groups):
        base = int(sizes[linked].min())
        rows = [
            _Row.of(groups, group, scores, widths, int(sizes[group]) // base, every.get(group, 1))
            for group in linked
        ]
        counts = [
            count
            for count in range(1, base - max(1, ceil(round(budget.min_kept * base, 6))) + 1)
            if all(row.can_lose(count, budget.round_to) for row in rows)
        ]
        remaining = sum(float(scores[row.members].sum()) for row in rows)
        steps, values = [], []
        for start, end in zip([0, *counts], counts, strict=False):
            channels = torch.cat([row.lost(start, end) for row in rows])
            score = float(scores[channels].sum())
            relative = score / (end - start) * base / remaining if remaining > 0 else 0.0
            values.append(max(relative, values[-1] if values else 0.0))
            steps.append(channels)
            remaining -= score
        if steps:
            found.append(RankedSet(steps, values))
    return found


def removal_steps(
    sets: list[RankedSet], sensitivity: Callable[[RankedSet], float]
) -> list[tuple[RankedSet, Tensor]]:
    """All steps in the order in which they are taken: the set and the channels of each."""
    weights = [sensitivity(one) for one in sets]
    values = torch.tensor(
        [weight * value for one, weight in zip(sets, weights, strict=True) for value in one.values],
        dtype=torch.float64,
        device="cpu",
    )
    steps = [(one, channels) for one in sets for channels in one.steps]
    return [steps[number] for number in values.sort(stable=True).indices.tolist()]


@dataclass(frozen=True, slots=True)
class _Row:
    """One group of channels, which loses `factor` of them when those linked to it lose one."""

    members: Tensor
    order: Tensor  # the channels that can be removed, those of the lowest scores first
    factor: int
    width: int  # the outputs of a layer that each channel is
    multiple: int  # of which a number of channels has to be removed

    @staticmethod
    def of(
        groups: ChannelGroups,
        group: int,
        scores: Tensor,
        widths: Tensor,
        factor: int,
        multiple: int,
    ) -> _Row:
        members = (groups.group == group).nonzero()[:, 0]
        free = members[~groups.frozen[members]]
        order = free[scores[free].sort(stable=True).indices]
        width = int(widths[free].min()) if len(free) else 1
        return _Row(members, order, factor, width, multiple)

    def can_lose(self, count: int, round_to: int) -> bool:
        lost = count * self.factor
        kept = (len(self.members) - lost) * self.width
        return lost <= len(self.order) and lost % self.multiple == 0 and kept % round_to == 0

    def lost(self, start: int, end: int) -> Tensor:
        return self.order[start * self.factor : end * self.factor]


def _linked(groups: ChannelGroups) -> list[list[int]]:
    """The groups with channels to remove; those that lose equal shares are in one list."""
    sizes = torch.bincount(groups.group).tolist()
    linked = list(range(len(sizes)))

    def first(group: int) -> int:
        while linked[group] != group:
            group = linked[group]
        return group

    def link(some: Iterable[int]) -> None:
        known: dict[int, int] = {}
        for group in some:
            linked[first(group)] = first(known.setdefault(sizes[group], group))

    for rows in groups.graph.balanced:
        if not rows.numel():  # such as the rest of a slice that takes everything
            continue
        found = groups.group[groups.channel[rows]]
        if bool((found == found[:, :1]).all()):
            link(found[:, 0].unique().tolist())
            continue
        first_row, *others = ([*dict.fromkeys(row)] for row in found.tolist())
        for other in others:
            for pair in _pairs(first_row, other, sizes):
                link(pair)
    for tie in groups.ties:
        heads = [*map(groups.group_of, tie.heads)]
        link(heads)
        for whole in map(groups.group_of, tie.wholes):
            if sizes[whole] == tie.step * sizes[heads[0]]:
                linked[first(whole)] = first(heads[0])
    free = set(groups.group[~groups.frozen].tolist())
    lists: dict[int, list[int]] = {}
    for group in range(len(sizes)):
        lists.setdefault(first(group), []).append(group)
    return [some for some in lists.values() if free.intersection(some)]


def _pairs(some: list[int], others: list[int], sizes: list[int]) -> Iterator[tuple[int, int]]:
    """The groups of two rows, such as the parts of a concatenation, that have equal sizes."""
    left = [group for group in others if group not in some]
    for group in some:
        same = [other for other in left if sizes[other] == sizes[group]]
        if same and group not in others:
            left.remove(same[0])
            yield group, same[0]
