"""One order in which the channels of all layers are removed.

Channels are removed in steps: one channel of a set of channels that are ranked together, or one of
each head or group that has to lose equally many, or as many as `round_to` demands. A step has the
value

    sensitivity · N · I / S

where I is the mean score of its channels, N the number of channels in their set, and S the sum of
the scores of the channels that are still there before it. N · I / S is the relative score of
DepGraph (Fang et al. 2023, section 3.3), with the sum over the remaining channels as in LAMP (Lee
et al. 2021). It does not depend on the scale or on the width of a layer, and it increases as a layer
shrinks, so that no layer is emptied before the others are small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from drophot.structured.budget import Budget
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
    widths = _widths(groups)
    found = []
    for linked in _linked(groups):
        rows = []
        for group in linked:
            members = (groups.group == group).nonzero()[:, 0]
            free = members[~groups.frozen[members]]
            rows.append((members, free[scores[free].sort(stable=True).indices]))
        size = len(rows[0][0])
        most = min(len(free) for _, free in rows)
        width = int(widths[rows[0][1]].min()) if most else 1
        counts = _removable(size, most, width, groups.multiples.get(size, 1), budget)
        remaining = sum(float(scores[members].sum()) for members, _ in rows)
        steps, values = [], []
        for start, end in zip([0, *counts], counts, strict=False):
            channels = torch.cat([free[start:end] for _, free in rows])
            score = float(scores[channels].sum())
            relative = score / (end - start) * size / remaining if remaining > 0 else 0.0
            values.append(max(relative, values[-1] if values else 0.0))
            steps.append(channels)
            remaining -= score
        if steps:
            found.append(RankedSet(steps, values))
    return found


def removal_step(
    sets: list[RankedSet], sensitivity: Callable[[RankedSet], float], num_channels: int
) -> tuple[Tensor, int]:
    """For each channel, the number of the step that removes it, and the number of steps.

    Channels that no step removes have the number of steps.
    """
    weights = [sensitivity(one) for one in sets]
    values = torch.tensor(
        [weight * value for one, weight in zip(sets, weights, strict=True) for value in one.values],
        dtype=torch.float64,
    )
    channels = [step for one in sets for step in one.steps]
    removed_at = torch.full((num_channels,), len(channels))
    for number, step in enumerate(values.sort(stable=True).indices.tolist()):
        removed_at[channels[step]] = number
    return removed_at, len(channels)


def _removable(size: int, most: int, width: int, multiple: int, budget: Budget) -> list[int]:
    """The numbers of channels that a set of `size` can lose, ascending, without 0."""
    least = max(1, ceil(round(budget.min_kept * size, 6)))
    return [
        count
        for count in range(1, min(most, size - least) + 1)
        if count % multiple == 0 and (size - count) * width % budget.round_to == 0
    ]


def _widths(groups: ChannelGroups) -> Tensor:
    """How many outputs of a layer each channel is: several for a whole head."""
    widths = torch.full((len(groups.frozen),), torch.iinfo(torch.int64).max)
    for ids in groups.outputs:
        count = torch.bincount(groups.channel[ids.unique()], minlength=len(widths))
        widths = torch.where(count > 0, torch.minimum(widths, count), widths)
    return widths


def _linked(groups: ChannelGroups) -> list[list[int]]:
    """The groups with channels to remove; those that lose equally many are in one list."""
    sizes = torch.bincount(groups.group)
    free = set(groups.group[~groups.frozen].tolist())
    linked = {group: group for group in range(len(sizes))}

    def first(group: int) -> int:
        while linked[group] != group:
            group = linked[group]
        return group

    for rows in groups.graph.balanced:
        by_size: dict[int, int] = {}
        for group in groups.group[groups.channel[rows.reshape(-1)]].unique().tolist():
            known = by_size.setdefault(int(sizes[group]), group)
            linked[first(group)] = first(known)
    found: dict[int, list[int]] = {}
    for group in range(len(sizes)):
        found.setdefault(first(group), []).append(group)
    return [some for some in found.values() if free.intersection(some)]
