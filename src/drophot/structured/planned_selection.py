"""Selects the channels that a plan names, and checks that they can be removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from drophot.structured.channel_groups import ChannelGroups
from drophot.structured.reasons import module_in


def check_fits(planned: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Refuse a model whose layers, with their numbers of outputs, are not those of the plan."""
    for name in (*planned, *found):
        expected, got = planned.get(name), found.get(name)
        if expected != got:
            has = "does not exist" if got is None else f"has {got} outputs"
            wants = "has no such layer" if expected is None else f"has {expected}"
            raise ValueError(
                f"`model` must have the layers of the plan, but `{name}` {has} and the plan "
                f"{wants}. Pass a model as it was when it was planned, or plan again."
            )


class PlannedSelection:
    """Removes exactly the planned channels, or raises an error.

    Args:
        planned: The outputs to remove, by the weight's name.
        outputs: The entries of the outputs of each layer, by the weight's name.
    """

    def __init__(
        self, planned: Mapping[str, Collection[int]], outputs: Mapping[str, Tensor]
    ) -> None:
        self.planned = planned
        self.outputs = outputs
        self._num_frozen: int | None = None  # by the graph, before the network was tried

    def __call__(self, groups: ChannelGroups, scores: Tensor) -> Tensor:
        """Whether each entry is removed."""
        removed = torch.zeros(len(groups.frozen), dtype=torch.bool, device="cpu")
        for name, indices in self.planned.items():
            if indices:
                ids = self.outputs.get(name)
                if ids is None:
                    raise ValueError(
                        f"The plan must remove channels that the model uses, but `{name}` is not "
                        f"used with these inputs. Plan again with the inputs that you apply it "
                        f"with."
                    )
                removed[groups.channel[ids[sorted(indices)]]] = True
        self._check(groups, removed)
        self._num_frozen = len(groups.graph.frozen)
        return removed[groups.channel]

    def _check(self, groups: ChannelGroups, removed: Tensor) -> None:
        for name, ids in self.outputs.items():
            gone = removed[groups.channel[ids]]
            planned = torch.zeros_like(gone)
            planned[sorted(self.planned.get(name, ()))] = True
            if (split := (gone != planned).nonzero()[:, 0]).numel():
                raise ValueError(
                    f"The plan must treat coupled channels alike, but it keeps channel "
                    f"{int(split[0])} of `{name}` and removes a channel that is coupled to it. "
                    f"Edit the plan with `remove` and `keep`, which change both."
                )
            if (stuck := (gone & groups.frozen[groups.channel[ids]]).nonzero()[:, 0]).numel():
                why = _reason(groups, int(groups.channel[ids[stuck[0]]]))
                if self._num_frozen is not None:
                    raise self._does_not_run(groups, why)
                raise ValueError(
                    f"The plan must remove channels that can be removed, but channel "
                    f"{int(stuck[0])} of `{name}` cannot: {why}. Keep it with `keep`."
                )
        if uneven := groups.uneven_rows(removed[groups.channel]):
            names = [name for name, ids in self.outputs.items() if torch.isin(uneven[0], ids).any()]
            raise ValueError(
                f"The plan must remove the same number of channels from each head or group, but it "
                f"removes different numbers in `{', '.join(names[:3])}`. Edit the plan."
            )

    def _does_not_run(self, groups: ChannelGroups, why: str) -> ValueError:
        """The error if the network, tried with the planned channels, cannot work with them."""
        path = module_in(why)
        kept = [ids for _, ids in groups.graph.frozen[self._num_frozen :]]
        tried = groups.channel[torch.cat(kept)] if kept else groups.channel[:0]
        found = [
            f"{len(ids) - len(gone)} of {len(ids)} in `{name}`"
            for name, ids in self.outputs.items()
            for gone in [self.planned.get(name, ())]
            if gone
            and (
                (path and name.startswith(f"{path}."))
                or bool(torch.isin(groups.channel[ids], tried).any())
            )
        ]
        return ValueError(
            f"The plan must leave numbers of channels that the model can work with, but it leaves "
            f"{', '.join(found)}: {why}. Attention, for example, needs as many channels as its "
            f"heads have together, and equally many in each head. Remove or keep channels until "
            f"the numbers fit."
        )


def _reason(groups: ChannelGroups, channel: int) -> str:
    for why, ids in groups.graph.frozen:
        if bool((groups.channel[ids] == channel).any()):
            return why
    return "no layer produces it"
