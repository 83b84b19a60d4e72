"""Explains for each layer why it keeps channels that should have been removed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from drophot.structured import reasons
from drophot.structured.channel_groups import ChannelGroups
from drophot.structured.dependency_graph import Axis, DependencyGraph


def explain(
    graph: DependencyGraph,
    groups: ChannelGroups,
    removed: Tensor,
    outputs: Mapping[str, list[Axis]],
    ratio: float | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """The reasons of layers that keep all of their channels, and those of all other layers.

    Args:
        graph: The entries and why they are frozen.
        groups: The channels.
        removed: Whether each entry is removed.
        outputs: The axes of the outputs of each layer, by the weight's name.
        ratio: The share that should have been removed; `None` if a budget or a plan decided.
    """
    none = len(graph.frozen) + 1
    first = torch.full((len(groups.frozen),), none, device="cpu")
    for number, (why, ids) in enumerate(graph.frozen):
        channels = groups.channel[ids]
        rank = 0 if why == reasons.OUTPUT else number + 1  # the most informative reason comes first
        first[channels] = first[channels].clamp(max=rank)
    produced = torch.zeros(len(groups.frozen), dtype=torch.bool, device="cpu")
    for ids in groups.outputs:
        produced[groups.channel[ids]] = True
    found = [reasons.OUTPUT, *(why for why, _ in graph.frozen)]
    unpruned, partly, steps = {}, {}, groups.steps()
    for name, axes in outputs.items():
        if not axes:
            unpruned[name] = reasons.UNUSED
        for axis in axes:
            ids = axis.ids.reshape(-1)
            channels = groups.channel[ids]
            frozen_by = first[channels[~removed[ids]]]
            group = int(groups.group[channels[0]])
            size = int((groups.group == group).sum())
            step = steps.get(group, 1)
            if len(frozen_by) and int(frozen_by.min()) < none:
                why = found[int(frozen_by.min())]
            elif not produced[channels].any():
                why = reasons.NOT_PRODUCED
            elif len(channels.unique()) == 1 < len(ids):
                why = "its channels can only be removed all together"
            elif step > 1:
                why = f"channels are removed {step} at a time, one for each head"
            elif ratio is None:
                why = reasons.RANKED if size > 1 else reasons.ONE
            elif ratio * size < 0.5 or size == 1:
                channels_are = "channel is" if size == 1 else "channels is"
                why = f"{ratio:.3g} of {size} {channels_are} less than one"
            else:
                why = "the layers, heads or groups that it is coupled to allow no more"
            (partly if removed[ids].any() else unpruned)[name] = why
    return unpruned, partly
