"""Selects the channels to remove, so that a network fits a budget."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import zip_longest
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from drophot._core.budget import Budget
from drophot.structured import single_call
from drophot.structured.channel_groups import ChannelGroups
from drophot.structured.dependency_graph import DependencyGraph
from drophot.structured.global_ranking import RankedSet, ranked_sets, removal_steps
from drophot.structured.network_cost import NetworkCost
from drophot.structured.network_writer import NetworkWriter
from drophot.structured.recorded_call import RecordedCall

# Sensitivities count up to this factor of their median, since a few inputs are little evidence.
_MOST = 10


class Unreachable(Exception):  # noqa: N818 (users get a ValueError)
    """A network does not fit the budget although all channels are removed that can be."""

    def __init__(self, limit: str, least: float, removed: Tensor) -> None:
        super().__init__()
        self.limit = limit
        self.least = least
        self.removed = removed


class UnreachableBudgetError(ValueError):
    """The error of a user whose budget cannot be reached.

    A caller whose arguments have other names rebuilds the message from `least` and `why`.
    """

    def __init__(self, budget: Budget, least: str, why: str) -> None:
        super().__init__(
            f"`to` must be reachable, got {budget!r}, but {least} remain with "
            f"min_kept={budget.min_kept}{why}. Raise the limit or lower `min_kept`."
        )
        self.budget = budget
        self.least = least
        self.why = why

    def __reduce__(self) -> tuple[type[UnreachableBudgetError], tuple[Budget, str, str]]:
        return type(self), (self.budget, self.least, self.why)  # so that processes can send it


class BudgetSelection:
    """Removes no more channels, in the order of `global_ranking`, than a budget needs.

    Args:
        model: The network.
        graph: The entries of its tensors.
        calls: The recorded calls in evaluation mode.
        example_inputs: The inputs on which the sensitivity of layers is measured.
        budget: The budget.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: DependencyGraph,
        calls: list[RecordedCall],
        example_inputs: Any,
        budget: Budget,
    ) -> None:
        self.budget = budget
        self.limits = {name: n for name, n in budget.limits.items() if name != "latency"}
        self.share = 0.0
        """The least share of the steps to take, in [0, 1]."""
        self._model = model
        self._example_inputs = example_inputs
        self._cost = NetworkCost(model, graph, calls)
        self._writer = NetworkWriter(model, graph, calls)
        self._dense: list[Tensor] | None = None
        self._changes: dict[bytes, float] = {}

    def __call__(self, groups: ChannelGroups, scores: Tensor) -> Tensor:
        """Whether each entry is removed; the network has all of its channels during the call."""
        while True:
            sets = ranked_sets(groups, scores, self.budget)
            changes = {id(one): self._change(groups, one) for one in sets}
            typical = median(changes.values()) if changes else 0.0

            def sensitivity(
                one: RankedSet, changes: dict[int, float] = changes, typical: float = typical
            ) -> float:
                if not typical:
                    return 1.0
                return min(max(changes[id(one)] / typical, 1 / _MOST), _MOST)

            steps = removal_steps(sets, sensitivity)
            removed_at = torch.full((len(groups.frozen),), len(steps), device="cpu")
            for number, (_, channels) in enumerate(steps):
                removed_at[channels] = number
            count = self._fewest(groups, removed_at, len(steps))
            removed = self._restored(groups, removed_at < count, steps[:count])
            entries = removed[groups.channel]
            uneven = groups.uneven_rows(entries)
            if not uneven:
                return entries
            scores = groups.couple_rows(uneven, scores)

    def largest(self, what: str, removed: Tensor, least: float = 0.1) -> list[tuple[str, int]]:
        """The parameters that are at least this share of what remains, and their elements or bytes.

        At most three, the largest first.
        """
        sizes = self._cost.by_parameter(what, removed)
        total = sum(sizes.values())
        found = [(name, size) for name, size in sizes.items() if size >= least * total]
        return sorted(found, key=lambda item: -item[1])[:3]

    def _fewest(self, groups: ChannelGroups, removed_at: Tensor, number: int) -> int:
        """The least number of steps with which all limits hold."""
        least = round(self.share * number)
        for name, limit in self.limits.items():
            low, high = least, number
            most = (removed_at < number)[groups.channel]
            if (cost := self._cost.of(name, most)) > limit:
                raise Unreachable(name, cost, most)
            while low < high:
                middle = (low + high) // 2
                if self._cost.of(name, (removed_at < middle)[groups.channel]) <= limit:
                    high = middle
                else:
                    low = middle + 1
            least = low
        return least

    def _restored(
        self, groups: ChannelGroups, removed: Tensor, steps: list[tuple[RankedSet, Tensor]]
    ) -> Tensor:
        """Take back steps, those of the highest rank first, while all limits hold.

        The last step may remove much more than was needed, such as a head.
        """

        def without(number: int) -> Tensor:
            fewer = removed.clone()
            for _, channels in left[:number]:
                fewer[channels] = False
            return fewer

        def fits(number: int) -> bool:
            entries = without(number)[groups.channel]
            return all(self._cost.of(name, entries) <= most for name, most in self.limits.items())

        left = steps[::-1] if self.limits and not self.share else []
        while left:
            low, high = 0, len(left) if fits(1) else 0
            while low < high:
                middle = (low + high + 1) // 2
                if fits(middle):
                    low = middle
                else:
                    high = middle - 1
            removed = without(low)
            # The channels of a set are removed in order, so its other steps have to stay.
            blocked = left[low][0] if low < len(left) else None
            left = [(one, channels) for one, channels in left[low + 1 :] if one is not blocked]
        return removed

    def _change(self, groups: ChannelGroups, one: RankedSet) -> float:
        """How much the outputs change without half of a set: the squared relative difference.

        An output of another shape, such as other boxes, has changed by all of its dense values.
        """
        channels = torch.zeros(len(groups.frozen), dtype=torch.bool, device="cpu")
        channels[one.half()] = True
        entries = channels[groups.channel]
        key = entries.nonzero().numpy().tobytes()  # sets change if more entries are coupled
        if key not in self._changes:
            if self._dense is None:
                self._dense = self._outputs()
            self._writer.removed = entries
            with self._writer.zeroed():
                found = self._outputs()
            off = sum(
                _squared_norm(b if a is None or a.shape != b.shape else a - b)
                for a, b in zip_longest(found[: len(self._dense)], self._dense)
            )
            size = sum(map(_squared_norm, self._dense))
            self._changes[key] = off / size if size else 0.0
        return self._changes[key]

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            out = single_call.run(self._model, self._example_inputs, nullcontext())
        return [t.double() for t in single_call.tensors_in(out) if t.is_floating_point()]


def _squared_norm(tensor: Tensor) -> float:
    return float(torch.where(tensor.isfinite(), tensor, 0).square().sum())
