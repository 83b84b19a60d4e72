"""The result of structured pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from drophot._core.budget import Budget
from drophot.structured.reasons import RANKED, merged


class Change(NamedTuple):
    """A count before and after."""

    before: int
    after: int

    @property
    def removed(self) -> float:
        """The share that was removed, in [0, 1]."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The result of structured pruning; `print` shows it as a table."""

    ratio: float | None
    """The requested share of channels to remove; `None` if a budget or a plan decided."""
    channels: Change
    """The outputs of all Conv and Linear layers and attention projections."""
    parameters: Change
    """All parameters, including biases and norms."""
    flops: Change
    """The operations for the example inputs in operators of known cost; a multiply-add is two."""
    bytes: Change
    """The memory of the parameters."""
    layers: Mapping[str, Change]
    """The outputs of each layer, by its weight's name."""
    kept_channels: Mapping[str, Tensor]
    """The indices of the outputs that each layer kept, `(K,)`, ascending, on the CPU."""
    kept_norm_channels: Mapping[str, Tensor]
    """The indices of the channels that each normalization layer kept, by its weight's name."""
    unpruned_layers: Mapping[str, str]
    """The layers and embeddings that kept all of their channels, and why."""
    num_requested: int
    """The number of channels to remove from all layers, each rounded separately."""
    not_removed: Mapping[str, int]
    """How many of the requested channels were not removed, by reason."""
    unpruned_parameters: Mapping[str, float]
    """Parameters that kept their shape and belong to no layer above: their share of all."""
    attributes: Mapping[str, Change]
    """The attributes that were changed, as `module.attribute`."""
    description: dict[str, Any]
    """The new shapes and attributes, in types that JSON has; see `rebuild`."""
    budget: Budget | None = None
    """The requested budget."""
    latency: tuple[float, float] | None = None
    """Milliseconds of a call before and after, if the budget limits them."""

    def __str__(self) -> str:
        lines = [self.request]
        for name in ("channels", "parameters", "flops", "bytes"):
            lines.append(change_line(name, getattr(self, name)))
        if self.latency is not None:
            lines.append(latency_line(self.latency))
        own: dict[tuple[str, Change], list[str]] = {}
        for name, change in self.attributes.items():
            _, _, last = name.rpartition(".")
            if last not in _LAYERS:
                own.setdefault((last, change), []).append(name)
        if own:
            changes = [
                f"{names[0] if len(names) == 1 else last} from {a} to {b}"
                + (f" in {len(names)} modules" if len(names) > 1 else "")
                for (last, (a, b)), names in own.items()
            ]
            lines.append(f"changed: {_some(changes)}")
        if self.not_removed:
            number = sum(self.not_removed.values())
            lines.append(f"not removed: {number:,} of {self.num_requested:,} requested channels:")
            most = merged(self.not_removed)
            lines += [f"{count:>10,}  {why}" for count, why in most[:_LINES]]
            if len(most) > _LINES:
                rest = sum(count for count, _ in most[_LINES:])
                lines.append(f"{rest:>10,}  for other reasons: see `not_removed`")
        if self.unpruned_parameters:
            most = sorted(self.unpruned_parameters.items(), key=lambda item: -item[1])
            whys = {name: f": {why}" for name, why in self.unpruned_layers.items()}
            shares = [
                f"{name} ({share:.1%} of the parameters{whys.get(name, '')})"
                for name, share in most
            ]
            shares = [one for one, (_, share) in zip(shares, most, strict=True) if share >= 5e-4]
            lines += [f"not pruned: {_some(shares)}"] if shares else []
        if self.ratio is None:
            lines += layer_table(self.layers, self.unpruned_layers)
        return "\n".join(lines)

    @property
    def request(self) -> str:
        """What was requested, in words."""
        if self.budget is not None:
            return f"requested: at most {self.budget}"
        if self.ratio is not None:
            return f"requested: remove {self.ratio:.1%} of the channels"
        return "requested: remove the channels of a plan"


def change_line(name: str, change: Change) -> str:
    """A line of a table: a count before and after, and the share that was removed."""
    return (
        f"{name:<10}  {change.before:>15,} to {change.after:>15,}  {change.removed:>6.1%} removed"
    )


def latency_line(latency: tuple[float, float]) -> str:
    """A line of a table: the milliseconds of a call before and after."""
    return "{:<10}  {:>15,.3g} to {:>15,.3g}  ms".format("latency", *latency)


def layer_table(layers: Mapping[str, Change], notes: Mapping[str, str]) -> list[str]:
    """A line for each layer: its channels before and after, and a note."""
    width = max(map(len, layers), default=0)
    return [
        f"{name:<{width}}  {change.before:>6,} to {change.after:>6,}  "
        f"{change.removed:>6.1%} removed  {note if note != RANKED else ''}".rstrip()
        for (name, change), note in zip(
            layers.items(), (notes.get(name, "") for name in layers), strict=True
        )
    ]


_LINES = 8  # the number of reasons that are shown


def _some(names: list[str], count: int = 4) -> str:
    """The first few names of a list, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# Attributes of torch's own layers that follow from the shapes of their weights.
_LAYERS = frozenset([
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_channels",
    "embedding_dim",
    "normalized_shape",
    "input_size",
    "hidden_size",
])
