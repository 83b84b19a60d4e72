"""Which channels are removed: in each group those of least importance, balanced between rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor, nn

from drophot._core.importance import Importance
from drophot._core.ratios import round_half_up
from drophot.structured.dependency_graph import Axis, DependencyGraph
from drophot.structured.importance import entry_values


@dataclass(frozen=True, slots=True)
class Tie:
    """Groups that lose equal shares because the network's code relates their sizes.

    An entry identifies its group, since groups are numbered again when more entries are coupled.
    """

    heads: tuple[int, ...]  # groups of equal size, which lose equally many channels
    wholes: tuple[int, ...] = ()  # groups that lose `step` channels for each one of a head
    step: int = 1


class ChannelGroups:
    """The channels of a network, in groups that are ranked together.

    A channel is a set of coupled entries. Channels belong to the same group if they have entries in
    the same dimensions of the same tensors, and in the same rows of those that have to lose equally
    many entries.

    Args:
        graph: The entries, and how they are coupled.
        outputs: The entries that layers produce. Other entries are kept unless they are coupled to
            one of these.
    """

    def __init__(self, graph: DependencyGraph, outputs: Sequence[Tensor]) -> None:
        self.graph = graph
        self.outputs = outputs
        self.ties: tuple[Tie, ...] = ()
        self._coupled_rows: list[tuple[Tensor, Tensor]] = []
        self._values: dict[str, list[Tensor]] = {}
        self.update()

    def update(self) -> None:
        """Recompute channels and groups after entries were coupled or frozen."""
        graph = self.graph
        self.channel = _components(graph.num_entries, [*graph.coupled, *self._coupled_rows])
        number = int(self.channel.max()) + 1 if graph.num_entries else 0
        self.frozen = torch.ones(number, dtype=torch.bool, device="cpu")
        for ids in self.outputs:
            self.frozen[self.channel[ids]] = False
        for _, ids in graph.frozen:
            self.frozen[self.channel[ids]] = True
        # Each dimension and row gets a random number; the sum over those that a channel is in
        # identifies its group.
        random = torch.Generator().manual_seed(0)
        keys = torch.zeros(number, dtype=torch.int64, device="cpu")
        for rows in (*([row] for row in graph.dimensions), *graph.balanced):
            for row in rows:
                keys[self.channel[row].unique()] += int(
                    torch.randint(1 << 62, (), generator=random, device="cpu")
                )
        _, self.group = keys.unique(return_inverse=True)

    def group_of(self, entry: int) -> int:
        """The group of the channel that an entry belongs to."""
        return int(self.group[self.channel[entry]])

    def widths(self) -> Tensor:
        """How many outputs of a layer each channel is: several for a whole head."""
        widths = torch.full((len(self.frozen),), torch.iinfo(torch.int64).max, device="cpu")
        for ids in self.outputs:
            count = torch.bincount(self.channel[ids.unique()], minlength=len(widths))
            widths = torch.where(count > 0, torch.minimum(widths, count), widths)
        return widths

    def steps(self) -> dict[int, int]:
        """By group: how many channels have to be removed at a time, where it is more than one."""
        sizes = torch.bincount(self.group).tolist()
        found: dict[int, int] = {}
        for tie in self.ties:
            heads = {sizes[self.group_of(entry)] for entry in tie.heads}
            for group in map(self.group_of, tie.wholes):
                if heads == {sizes[group] // tie.step}:  # otherwise, more was coupled since then
                    found[group] = lcm(found.get(group, 1), tie.step)
        return found

    def select(self, ratio: float, scores: Tensor) -> Tensor:
        """Select a share of each group, the channels with the lowest scores.

        `scores` has one value per channel; the result says of each entry whether it is removed.
        """
        while True:
            removed, steps = (
                torch.zeros(len(self.frozen), dtype=torch.bool, device="cpu"),
                self.steps(),
            )
            for group in self.group[~self.frozen].unique().tolist():
                members = ((self.group == group) & ~self.frozen).nonzero()[:, 0]
                size = int((self.group == group).sum())
                step = steps.get(group, 1)
                count = min(step * round_half_up(ratio * size / step), size - step, len(members))
                count -= count % step
                order = scores[members].sort(stable=True).indices
                removed[members[order[: max(count, 0)]]] = True
            entries = removed[self.channel]
            uneven = self.uneven_rows(entries)
            if not uneven:
                return entries
            scores = self.couple_rows(uneven, scores)

    def uneven_rows(self, removed: Tensor) -> list[Tensor]:
        """The rows that have to lose equally many entries and do not."""
        return [rows for rows in self.graph.balanced if len(removed[rows].sum(1).unique()) > 1]

    def couple_rows(self, uneven: Sequence[Tensor], scores: Tensor) -> Tensor:
        """Let rows lose the same entries from now on; the scores of the channels after that."""
        for rows in uneven:
            pairs = rows[:1].expand_as(rows).reshape(-1), rows.reshape(-1)
            self._coupled_rows.append(pairs)
        return self._merged(scores)

    def _merged(self, scores: Tensor) -> Tensor:
        """The scores after channels were merged: the sums of their scores."""
        before = self.channel
        self.update()
        into = torch.zeros(len(scores), dtype=torch.int64, device="cpu")
        into[before] = self.channel
        return torch.zeros(len(self.frozen), dtype=scores.dtype, device="cpu").index_add_(
            0, into, scores
        )

    def scores(
        self, weights: Mapping[str, tuple[nn.Parameter, int, list[Axis]]], importance: Importance
    ) -> Tensor:
        """The score of each channel, `(channels,)`.

        It is the sum over weights and their dimensions of the importance of the channel's entries,
        divided by the mean importance of the channels of its group in that dimension.

        Args:
            weights: By name: the weight, the dimension of its outputs and its axes.
            importance: The importance of weights or of output channels.
        """
        total = torch.zeros(len(self.frozen), dtype=torch.float64, device="cpu")
        sizes = torch.bincount(self.group)
        for name, (weight, dim, axes) in weights.items():
            if name not in self._values:
                self._values[name] = entry_values(importance, name, weight, dim, axes)
            for axis, values in zip(axes, self._values[name], strict=True):
                channels = self.channel[axis.ids.reshape(-1)]
                own = torch.zeros_like(total).index_add_(0, channels, values)
                groups = torch.zeros(len(sizes), dtype=own.dtype, device="cpu").index_add_(
                    0, self.group, own
                )
                mean = (groups / sizes)[self.group]
                total += torch.where(mean > 0, own / mean, 0)
        return total


def _components(count: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The connected component of each of `count` entries, from pairs of entries."""
    least = torch.arange(count, device="cpu")
    if not pairs:
        return least
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    while True:
        low = torch.minimum(least[a], least[b])
        after = least.clone()
        after.scatter_reduce_(0, least[a], low, "amin")
        after.scatter_reduce_(0, least[b], low, "amin")
        after = after[after]
        if bool((after == least).all()):
            return after.unique(return_inverse=True)[1]
        least = after
