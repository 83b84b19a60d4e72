"""A plan: which channels would be removed, to read, edit, store and apply."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from torch import nn

from drophot._core import scalars
from drophot._core.budget import Budget
from drophot._core.importance import Importance
from drophot.structured import stored_plan
from drophot.structured.guarded_run import prune
from drophot.structured.model_names import names_in
from drophot.structured.pruning_result import (
    Change,
    Pruned,
    change_line,
    latency_line,
    layer_table,
)
from drophot.structured.pruning_run import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPlan:
    """Which channels of which layers would be removed; `print` shows it as a table.

    `plan_channels` makes one. `remove` and `keep` return an edited plan, `apply` prunes a model,
    and `to_json` and `from_json` store it.
    """

    request: str
    """What was requested, in words."""
    removed: Mapping[str, tuple[int, ...]]
    """The indices of the outputs that each layer would lose, ascending, by its weight's name."""
    channels: Mapping[str, tuple[int, ...]]
    """For each output of each layer, the number of its channel.

    Outputs with the same number, in any layers, are coupled: they are removed together.
    """
    reasons: Mapping[str, str]
    """Why a layer would keep channels, by its weight's name."""
    parameters: Change | None
    """All parameters before and after; `None` after an edit, until the plan is applied."""
    flops: Change | None
    """The operations for the example inputs, two for each multiply-add; `None` after an edit."""
    bytes: Change | None
    """The memory of the parameters; `None` after an edit."""
    latency: tuple[float, float] | None
    """Milliseconds of a call before and after, if a budget limits them."""
    skip: tuple[str, ...]
    """The modules and parameters that keep their shape."""
    whole_heads: tuple[tuple[str, int], ...]
    """The modules whose attention would lose whole heads, and the width of these heads."""

    @property
    def layers(self) -> dict[str, Change]:
        """The number of outputs of each layer before and after, by its weight's name."""
        return {
            name: Change(len(channels), len(channels) - len(self.removed[name]))
            for name, channels in self.channels.items()
        }

    def remove(self, layer: str, channels: Iterable[int]) -> ChannelPlan:
        """A plan that also removes these channels, and the outputs that are coupled to them.

        Args:
            layer: The name of a weight, as in `removed`.
            channels: Indices of its outputs.

        Returns:
            The edited plan; this one is unchanged.

        Raises:
            TypeError: If `layer` is not a string, `channels` is not a collection, or an index is
                not an integer.
            ValueError: If the layer or an index does not exist, or a layer would lose all channels.

        Example:
            >>> import torch
            >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
            >>> plan = plan_channels(model, 0.0, torch.ones(1, 4))
            >>> plan.remove("0.weight", [1]).removed
            {'0.weight': (1,), '2.weight': ()}
        """
        numbers = self._numbers(layer, channels)
        edited = self._edited(lambda number, gone: gone or number in numbers)
        for name, change in edited.layers.items():
            if change.after == 0:
                raise ValueError(
                    f"`channels` must leave each layer at least one channel, but `{name}` would "
                    f"lose all {change.before}. Keep one of them."
                )
        return edited

    def keep(self, layer: str, channels: Iterable[int]) -> ChannelPlan:
        """A plan that keeps these channels, and the outputs that are coupled to them.

        Args:
            layer: The name of a weight, as in `removed`.
            channels: Indices of its outputs.

        Returns:
            The edited plan; this one is unchanged.

        Raises:
            TypeError: If `layer` is not a string, `channels` is not a collection, or an index is
                not an integer.
            ValueError: If the layer or an index does not exist.
        """
        numbers = self._numbers(layer, channels)
        return self._edited(lambda number, gone: gone and number not in numbers)

    def apply(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        rules: Mapping[Any, Callable[..., None]] | None = None,
    ) -> Pruned:
        """Remove exactly the planned channels from a model, in place.

        The model is recorded and the pruned network is checked as in `prune_channels`, so that a
        plan that does not fit the model, or that the model cannot work with, is an error.

        Args:
            model: A model with the layers of the planned one; its weights may be others. It may be
                wrapped by `torch.compile`, `DataParallel` or `AveragedModel` or not, regardless of
                the planned one.
            example_inputs: As in `prune_channels`.
            rules: As in `prune_channels`.

        Returns:
            The counts before and after, and the channels that each layer kept.

        Raises:
            ValueError: If the layers of the model are not those of the plan, if the plan separates
                coupled channels or removes channels that have to be kept, or for a reason for which
                `prune_channels` raises one. The model is unchanged then.
            RuntimeError: If drophot itself fails.
        """
        named = names_in(
            model, [*self.channels, *self.skip], [path for path, _ in self.whole_heads]
        )
        pruned, _ = prune(
            "ChannelPlan.apply",
            model,
            Request(
                planned={named[name]: gone for name, gone in self.removed.items()},
                planned_sizes={named[name]: len(own) for name, own in self.channels.items()},
                whole_heads=[(named[path], width) for path, width in self.whole_heads],
            ),
            example_inputs,
            skip=[named[name] for name in self.skip],
            rules=rules,
        )
        return pruned

    def to_json(self) -> str:
        """The plan as JSON."""
        values = asdict(self)
        return json.dumps({**values, stored_plan.DIGESTS: stored_plan.digests(values)})

    @staticmethod
    def from_json(text: str) -> ChannelPlan:
        """The plan that `to_json` stored.

        You may edit `removed` in the text. As for `remove` and `keep`, the plan is marked as
        edited then and has no costs.

        Args:
            text: The result of `to_json`.

        Returns:
            The plan.

        Raises:
            ValueError: If the text is not the JSON of a plan, or a field in it has another value
                than a plan can have; the error names both.
        """
        try:
            found = json.loads(text)
        except (ValueError, TypeError) as error:
            start = repr(text if isinstance(text, str) else type(text).__name__)
            raise ValueError(
                f"`text` must be the JSON of a ChannelPlan, got {start:.60}: {error}. Pass the "
                f"result of `to_json`."
            ) from error
        values, is_edited = stored_plan.read(found, [one.name for one in fields(ChannelPlan)])
        plan = ChannelPlan(**values)
        return plan._without_costs() if is_edited else plan

    def __str__(self) -> str:
        lines = [self.request]
        for name in ("parameters", "flops", "bytes"):
            change: Change | None = getattr(self, name)
            if change is not None:
                lines.append(change_line(name, change))
        if self.parameters is None:
            lines.append("costs: not computed; `apply` counts them")
        if self.latency is not None:
            lines.append(latency_line(self.latency))
        removed = {name: f"channels {_ranges(gone)}" for name, gone in self.removed.items() if gone}
        return "\n".join([*lines, *layer_table(self.layers, {**self.reasons, **removed})])

    def _numbers(self, layer: str, channels: Iterable[int]) -> set[int]:
        """The numbers of the channels of these outputs."""
        if not isinstance(layer, str):
            raise TypeError(
                f"`layer` must be the name of a weight, as in `removed`, got {layer!r}. It has "
                f"{', '.join(self.channels)}."
            )
        if not isinstance(channels, Iterable) or isinstance(channels, str):
            fix = f" Pass [{channels}]." if type(channels) is int else ""
            raise TypeError(f"`channels` must be a collection of indices, got {channels!r}.{fix}")
        own = self.channels.get(layer)
        if own is None:
            near = get_close_matches(layer, self.channels, n=1)
            fix = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(self.channels)}."
            raise ValueError(f"`layer` must be a layer of the plan, got {layer!r}. {fix}")
        found = [scalars.integer("channels", index) for index in channels]
        for index in found:
            if not 0 <= index < len(own):
                raise ValueError(
                    f"`channels` must be indices of the {len(own)} outputs of `{layer}`, got "
                    f"{index}. The last one is {len(own) - 1}."
                )
        return {own[index] for index in found}

    def _edited(self, is_removed: Callable[[int, bool], bool]) -> ChannelPlan:
        removed = {}
        for name, numbers in self.channels.items():
            before = set(self.removed[name])
            removed[name] = tuple(
                index for index, number in enumerate(numbers) if is_removed(number, index in before)
            )
        if removed == self.removed:
            return self
        return replace(self, removed=removed)._without_costs()

    def _without_costs(self) -> ChannelPlan:
        """The plan marked as edited, without the costs that it had before."""
        request = self.request if self.request.endswith(_EDITED) else self.request + _EDITED
        return replace(self, request=request, parameters=None, flops=None, bytes=None, latency=None)


_EDITED = " (edited)"


def plan_channels(
    model: nn.Module,
    ratio: float | None = None,
    example_inputs: Any = None,
    *,
    to: Budget | None = None,
    skip: Iterable[str] = (),
    importance: Importance | None = None,
    rules: Mapping[Any, Callable[..., None]] | None = None,
) -> ChannelPlan:
    """Plan which channels `prune_channels` would remove; the model is unchanged.

    The channels are removed, the network is checked and measured, and then it is restored, so the
    plan is what `prune_channels` would do with the same arguments. It takes as long.

    Args:
        model: As in `prune_channels`, like all arguments.
        ratio: The share removed, in [0, 1). Pass either this or `to`.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
        to: What the network may cost at most.
        skip: Names of modules or parameters that keep their shape.
        importance: A function `(name, weight) -> Tensor`.
        rules: Functions by operator.

    Returns:
        The channels that each layer would lose, why others stay, and the cost before and after.

    Raises:
        TypeError: For the same reasons as in `prune_channels`.
        ValueError: For the same reasons as in `prune_channels`.
        RuntimeError: If drophot itself fails.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = plan_channels(model, example_inputs=torch.ones(1, 4), to=Budget(parameters=40))
        >>> plan.parameters, model[0].out_features
        (Change(before=58, after=37), 8)
        >>> pruned = plan.apply(model, torch.ones(1, 4))
        >>> model[0].out_features
        5
    """
    skip = skip if isinstance(skip, str) or not isinstance(skip, Iterable) else tuple(skip)
    pruned, run = prune(
        "plan_channels",
        model,
        Request.of(ratio, to),
        example_inputs,
        skip=skip,
        importance=importance,
        rules=rules,
    )
    rewriter = run.rewriter
    rewriter.writer.restore()
    unpruned, partly = run.reasons()
    return ChannelPlan(
        request=pruned.request,
        removed={
            name: _without(change.before, pruned.kept_channels[name].tolist())
            for name, change in pruned.layers.items()
        },
        channels={name: tuple(numbers) for name, numbers in rewriter.channel_numbers().items()},
        reasons=unpruned | partly,
        parameters=pruned.parameters,
        flops=pruned.flops,
        bytes=pruned.bytes,
        latency=pruned.latency,
        skip=tuple(skip),
        whole_heads=tuple(sorted(run.whole_heads)),
    )


def _without(number: int, kept: Collection[int]) -> tuple[int, ...]:
    return tuple(sorted(set(range(number)) - set(kept)))


def _ranges(indices: Iterable[int]) -> str:
    """Ascending integers, with runs as ranges: `0-3, 7`."""
    found = []
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        found.append(f"{values[0]}-{values[-1]}" if len(values) > 1 else str(values[0]))
    return ", ".join(found[:_SHOWN]) + (f", … {len(found) - _SHOWN} more" * (len(found) > _SHOWN))


_SHOWN = 8  # ranges in a line
