"""Which entries go: the least of each pool of entries that are alike, equally many of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from drophot._core.ratios import round_half_up
from drophot.structured.dependency_graph import Axis, Ties


class Pools:
    """The channels of a network, as sets that are ranked together.

    A channel is a set of entries that go together, an output of a layer among them. Channels that
    belong to the same dimensions of the same tensors, and to the same rows of those that have to
    lose equally many, are a pool.

    Args:
        ties: What the forward pass said.
        outputs: The entries that layers make; others stay, unless they go together with these.
    """

    def __init__(self, ties: Ties, outputs: Sequence[Tensor]) -> None:
        self.ties = ties
        self.outputs = outputs
        self._more: list[tuple[Tensor, Tensor]] = []
        self.multiples: dict[int, int] = {}  # by a pool's size: what is removed of it divides by it
        self._squares: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.settle()

    def settle(self) -> None:
        """Take in what was tied or fixed since."""
        ties = self.ties
        self.channel = _components(ties.count, [*ties.same, *self._more])
        number = int(self.channel.max()) + 1 if ties.count else 0
        self.stays = torch.ones(number, dtype=torch.bool)
        for ids in self.outputs:
            self.stays[self.channel[ids]] = False
        for _, ids in ties.fixed:
            self.stays[self.channel[ids]] = True
        # A sum of random numbers, one for each set that a channel is in, names the sets it is in.
        random = torch.Generator().manual_seed(0)
        names = torch.zeros(number, dtype=torch.int64)
        for rows in (*([row] for row in (*ties.rows, *ties.parts)), *ties.level):
            for row in rows:
                names[self.channel[row].unique()] += int(
                    torch.randint(1 << 62, (), generator=random)
                )
        _, self.pool = names.unique(return_inverse=True)

    def tie(self, rows: Tensor) -> None:
        """Let rows lose the same entries.

        Args:
            rows: Entries, `(rows, length)`.
        """
        self._more.append((rows[:1].expand_as(rows).reshape(-1), rows.reshape(-1)))

    def removed(self, ratio: float, scores: Tensor) -> Tensor:
        """Take a share of each pool, those with the least scores.

        Args:
            ratio: The share.
            scores: Of each channel.

        Returns:
            Whether an entry goes, `(count,)`.
        """
        while True:
            gone = torch.zeros(len(self.stays), dtype=torch.bool)
            for pool in self.pool[~self.stays].unique():
                members = ((self.pool == pool) & ~self.stays).nonzero()[:, 0]
                size = int((self.pool == pool).sum())
                step = self.multiples.get(size, 1)
                count = min(step * round_half_up(ratio * size / step), size - step, len(members))
                count -= count % step
                order = scores[members].sort(stable=True).indices
                gone[members[order[: max(count, 0)]]] = True
            entries = gone[self.channel]
            uneven = [rows for rows in self.ties.level if len(entries[rows].sum(1).unique()) > 1]
            if not uneven:
                return entries
            for rows in uneven:
                self.tie(rows)
            scores = self._joined(scores)

    def _joined(self, scores: Tensor) -> Tensor:
        before = self.channel
        self.settle()
        into = torch.zeros(len(scores), dtype=torch.int64)
        into[before] = self.channel
        return torch.zeros(len(self.stays), dtype=scores.dtype).index_add_(0, into, scores)

    def scores(self, weights: Mapping[nn.Parameter, list[Axis]]) -> Tensor:
        """How large the weights are that go with a channel.

        Args:
            weights: With their axes.

        Returns:
            For each channel the sum over the weights' dimensions of its share of the squares,
            against the mean of its pool.
        """
        total = torch.zeros(len(self.stays), dtype=torch.float64)
        sizes = torch.bincount(self.pool)
        for weight, axes in weights.items():
            for axis, part in zip(axes, self._parts(weight, axes), strict=True):
                channels = self.channel[axis.ids.reshape(-1)]
                own = torch.zeros_like(total).index_add_(0, channels, part)
                pools = torch.zeros(len(sizes), dtype=own.dtype).index_add_(0, self.pool, own)
                mean = (pools / sizes)[self.pool]
                total += torch.where(mean > 0, own / mean, 0)
        return total

    def _parts(self, weight: nn.Parameter, axes: list[Axis]) -> list[Tensor]:
        """The sum of squares at each entry of each axis."""
        if weight not in self._squares:
            square = weight.detach().cpu().float().square()
            self._squares[weight] = [
                square
                .sum([d for d in range(weight.dim()) if axis.ids.size(d) == 1], keepdim=True)
                .reshape(-1)
                .double()
                if axis.ids.numel() < square.numel()
                else square.reshape(-1).double()
                for axis in axes
            ]
        return self._squares[weight]


def _components(count: int, same: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The number of the set that each entry is in, if pairs of entries are in the same one."""
    least = torch.arange(count)
    if not same:
        return least
    a, b = (torch.cat(side) for side in zip(*same, strict=True))
    while True:
        low = torch.minimum(least[a], least[b])
        after = least.clone()
        after.scatter_reduce_(0, least[a], low, "amin")
        after.scatter_reduce_(0, least[b], low, "amin")
        after = after[after]
        if bool((after == least).all()):
            return after.unique(return_inverse=True)[1]
        least = after
