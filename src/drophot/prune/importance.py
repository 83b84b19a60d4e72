"""Rank weights by magnitude, or by an importance function of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drophot._core import order_statistics
from drophot._core.importance import Importance, importance_name
from drophot._core.radix_select import has_kernels
from drophot.prune.device_pruning import count_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The order in which the weights of a model are removed."""

    values: Mapping[str, Tensor]
    """By parameter name: the weights themselves, or their importances."""
    earlier: Mapping[str, Tensor]
    """The masks of an earlier pruning. Weights that they removed are removed first, and count."""
    signed: bool = False
    """Whether the values are compared with their signs, instead of by magnitude."""

    def layers(self, names: Sequence[str], count: int) -> order_statistics.Layers:
        """These layers, if they lose `count` weights together."""
        masks = [self.earlier.get(name) for name in names]
        return order_statistics.Layers([self.values[name] for name in names], count, masks)

    def nonzero_layers(self) -> set[str]:
        """The names of the layers whose values are not all zero."""
        if has_kernels(self.values.values()):
            counts = count_values([*self.values.values()])
            return {name for name, count in zip(self.values, counts, strict=True) if count.nonzero}
        return {name for name, value in self.values.items() if value.any()}

    def counts(self, names: Sequence[str], count: int) -> dict[str, int]:
        """How many weights each layer loses if these layers lose `count` together."""
        layers = self.layers(names, count)
        threshold = order_statistics.magnitude_threshold(layers, signed=self.signed)
        return dict(zip(names, order_statistics.count_removed(threshold, layers), strict=True))


def rank_by(
    importance: Importance,
    weights: Mapping[str, nn.Parameter],
    earlier: Mapping[str, Tensor],
    *,
    scope: str,
) -> Ranking:
    """Call an importance function for each weight, and check and copy the returned tensors."""
    values: dict[str, Tensor] = {}
    rule = f"The importance function `{importance_name(importance)}` must return"
    together = has_kernels(weights.values())  # one wait for the device, not one for each layer
    for name, weight in weights.items():
        returned = importance(name, weight)
        _check_returned(returned, rule, name, weight)
        # A copy, since the function may return the weight itself, or one buffer for all layers.
        value = torch.empty(weight.shape, dtype=returned.dtype, device=weight.device)
        value.copy_(returned.detach())
        if (mask := earlier.get(name)) is not None:
            value.masked_fill_(~mask, 0)
        values[name] = value
        if not together:
            _check_values(value, rule, name, scope)
    if together:
        counts = count_values([*values.values()])
        for (name, value), count in zip(values.items(), counts, strict=True):
            if count.not_finite or (scope == "lamp" and count.negative):
                _check_values(value, rule, name, scope)
    return Ranking(values=values, earlier=earlier, signed=True)


def _check_values(value: Tensor, rule: str, name: str, scope: str) -> None:
    least, most = value.aminmax()
    if not (least.isfinite() and most.isfinite()):
        bad = int((~value.isfinite()).count_nonzero())
        raise ValueError(
            f"{rule} finite values, got {bad} that are NaN or infinite for `{name}`. Replace "
            f"them, with torch.nan_to_num for example, or name the layer in `skip`."
        )
    if scope == "lamp" and least < 0:
        raise ValueError(
            f'{rule} no negative values with scope="lamp", which squares them, got '
            f"{float(least):g} for `{name}`. Return absolute values, or use another scope."
        )


def _check_returned(returned: Any, rule: str, name: str, weight: Tensor) -> None:
    if not isinstance(returned, Tensor):
        raise TypeError(
            f"{rule} a torch.Tensor, got {type(returned).__name__} for `{name}`. Return one value "
            f"for each weight, such as `weight.abs()`."
        )
    if returned.shape != weight.shape:
        raise ValueError(
            f"{rule} a tensor of the weight's shape {tuple(weight.shape)}, got shape "
            f"{tuple(returned.shape)} for `{name}`. To give several weights the same importance, "
            f"use expand_as(weight)."
        )
    if returned.layout != torch.strided or returned.is_meta:
        raise ValueError(
            f"{rule} a dense tensor with data, got {returned.layout} on {returned.device} for "
            f"`{name}`. Call to_dense() on a sparse tensor."
        )
    if not returned.is_floating_point() or returned.dtype.itemsize < 2:
        raise TypeError(
            f"{rule} floats of 16 bits or more, got {returned.dtype} for `{name}`. Convert it "
            f"with .float()."
        )
