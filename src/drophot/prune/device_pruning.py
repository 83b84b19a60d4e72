"""Pruning on a GPU: a few launches for all layers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from drophot._core import radix_select
from drophot._core.radix_select import DTypes, TensorTable

_EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCounts:
    """What one pass over a tensor counts."""

    nonzero: int
    not_finite: int
    negative: int
    revived: int
    """Nonzero values that the mask of an earlier pruning removed."""
    removed: int
    """What that mask removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The masks of pruned weights, and what was counted while they were written."""

    masks: list[Tensor]
    removed: list[int]
    kept_zeros: list[int]


def count_values(
    values: Sequence[Tensor], earlier: Sequence[Tensor | None] = ()
) -> list[ValueCounts]:
    """Count the values of each tensor, in one launch and with one wait for the device."""
    values = [radix_select.addressable(value.detach()) for value in values]
    table = radix_select.tensor_table(values, range(len(values)), earlier=earlier)
    module = _kernels()

    def constants_of(dtypes: DTypes) -> Mapping[str, Any]:
        keys = radix_select.float_keys([dtypes.values], signed=True)
        constants = radix_select.key_constants(table, dtypes.values, keys)
        names = ("FLOAT", "RAW", "KEY", "WIDTH", "MASKED", "STRIDED")
        return {name: constants[name] for name in names} | {"EXPONENT": _EXPONENTS[dtypes.values]}

    counts = _new_counts(table)
    radix_select.launch(module.count_values, table, counts, constants_of=constants_of)
    return [
        ValueCounts(
            nonzero=nonzero,
            not_finite=not_finite,
            negative=negative,
            revived=revived,
            removed=removed,
        )
        for nonzero, not_finite, negative, revived, removed, _ in table.by_tensor(counts).tolist()
    ]


def prune_smallest(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    counts: Sequence[int],
    *,
    earlier: Sequence[Tensor | None],
    values: Sequence[Tensor] | None = None,
) -> Pruned:
    """Remove the smallest weights of each group, as `order_statistics.pruner` does on a CPU.

    Args:
        weights: They are changed in place.
        groups: The number of the group of each weight, from 0, ascending.
        counts: How many weights each group loses.
        earlier: For each weight the mask of an earlier pruning, or `None`.
        values: What the weights are ranked by, with their signs, if not their magnitudes.
    """
    targets = _Targets(weights)
    table = targets.table(groups, earlier, values)
    ranked = weights if values is None else values
    keys = radix_select.float_keys((value.dtype for value in ranked), signed=values is not None)
    state = radix_select.find_thresholds(table, keys, counts)
    below = radix_select.count_below(table, keys, state, only_split=True)
    tied = below[:, 1]
    before = tied.cumsum(0) - tied
    before -= before[table.first_chunks][_group_of_chunks(table)]
    tally = _new_counts(table)
    radix_select.launch_keyed(
        _kernels().prune_below, table, keys, state, before, tally, prunes=True
    )
    return targets.pruned(table, tally)


def prune_groups(
    weights: Sequence[Tensor],
    n: int,
    m: int,
    dims: Sequence[int],
    *,
    earlier: Sequence[Tensor | None],
    values: Sequence[Tensor] | None = None,
) -> Pruned:
    """Keep the `n` largest of each `m` consecutive weights: see `semi_structured.prune_groups`."""
    targets = _Targets(weights)
    inner = [prod(weight.shape[dim + 1 :]) for weight, dim in zip(weights, dims, strict=True)]
    table = targets.table(range(len(weights)), earlier, values, inner)
    ranked = weights if values is None else values
    keys = radix_select.float_keys((value.dtype for value in ranked), signed=values is not None)
    radix_select.launch_keyed(_kernels().keep_largest, table, keys, n, m)
    tally = _new_counts(table)
    radix_select.launch(
        _kernels().apply_masks,
        table,
        tally,
        constants_of=lambda dtypes: radix_select.weight_constants(table, dtypes),
    )
    return targets.pruned(table, tally)


class _Targets:
    """Weights that are pruned in place, and their new masks."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = [weight.detach() for weight in weights]
        self._changed = [radix_select.addressable(weight) for weight in self._weights]
        self._masks = [
            torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
            for weight in self._weights
        ]

    def table(
        self,
        groups: Sequence[int],
        earlier: Sequence[Tensor | None],
        values: Sequence[Tensor] | None,
        inner: Sequence[int] = (),
    ) -> TensorTable:
        return radix_select.tensor_table(
            # The strides in the table are those of the weights.
            self._changed if values is None else [value.contiguous() for value in values],
            groups,
            earlier=earlier,
            weights=self._changed,
            masks=self._masks,
            inner=inner,
        )

    def pruned(self, table: TensorTable, tally: Tensor) -> Pruned:
        """The result, after the kernels have written to the weights behind autograd's back."""
        for weight, changed in zip(self._weights, self._changed, strict=True):
            if changed is not weight:
                weight.copy_(changed)
            elif not weight.is_inference():
                increment_version(weight)
        counted = table.by_tensor(tally).tolist()
        return Pruned(
            masks=self._masks,
            removed=[removed for *_, removed, _ in counted],
            kept_zeros=[zeros for *_, zeros in counted],
        )


def _kernels() -> Any:
    return radix_select.kernels("drophot.prune.pruning_kernels")


def _new_counts(table: TensorTable) -> Tensor:
    """Zeros by chunk, for the numbers that `pruning_kernels` declares as a tally."""
    shape = (len(table.chunks), 6)
    return torch.zeros(shape, dtype=torch.int64, device=table.rows.device)


def _group_of_chunks(table: TensorTable) -> Tensor:
    return table.rows[:, 4][table.chunks]
