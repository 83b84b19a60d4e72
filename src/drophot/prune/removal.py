"""Set the lowest-ranked weights to zero, and count what was removed.

All layers are processed together: on a GPU by the kernels of `device_pruning`, and elsewhere in
blocks that fit in the cache of a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from drophot._core import order_statistics
from drophot._core.radix_select import has_kernels
from drophot.prune import device_pruning, semi_structured
from drophot.prune.importance import Ranking
from drophot.prune.layer_sparsity import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The masks of pruned weights, by name."""

    masks: dict[str, Tensor]
    kept_zeros: dict[str, int]
    """How many zeros are not masked in each layer, 0 if a layer is missing."""
    num_removed: int | None
    """How many weights are removed; not counted without an earlier pruning."""


def remove_by_rank(
    weights: Mapping[str, nn.Parameter], ranking: Ranking, groups: Groups
) -> Removal:
    """Remove the lowest-ranked weights of each group of layers."""
    if _are_pruned_together(weights, ranking.values):
        names = [name for members, _ in groups for name in members]
        found = device_pruning.prune_smallest(
            [weights[name] for name in names],
            [number for number, (members, _) in enumerate(groups) for _ in members],
            [count for _, count in groups],
            earlier=[ranking.earlier.get(name) for name in names],
            values=[ranking.values[name] for name in names] if ranking.signed else None,
        )
        return _removal(names, found)
    layers = [ranking.layers(names, count) for names, count in groups]
    thresholds = order_statistics.magnitude_thresholds(layers, signed=ranking.signed)
    pruned = [[weights[name] for name in names] for names, _ in groups]
    found = order_statistics.prune_below(layers, thresholds, pruned)
    masks: dict[str, Tensor] = {}
    may_keep_zeros: list[str] = []
    for (names, _), threshold, own in zip(groups, thresholds, found, strict=True):
        masks |= dict(zip(names, own, strict=True))
        if ranking.signed or threshold.key <= 0:  # else all zeros are below the threshold
            may_keep_zeros += names
    return _counted(masks, {name: weights[name] for name in may_keep_zeros}, ranking)


def remove_by_pattern(
    weights: Mapping[str, nn.Parameter], ranking: Ranking, n: int, m: int, dims: Mapping[str, int]
) -> Removal:
    """Keep the `n` highest-ranked of each `m` consecutive weights along the given dimensions."""
    names = [*dims]
    chosen = {name: weights[name] for name in names}
    values = {name: ranking.values[name] for name in names} if ranking.signed else {}
    if _are_pruned_together(chosen, values):
        found = device_pruning.prune_groups(
            [*chosen.values()],
            n,
            m,
            [*dims.values()],
            earlier=[ranking.earlier.get(name) for name in names],
            values=[*values.values()] or None,
        )
        return _removal(names, found)
    masks = {
        name: semi_structured.prune_groups(
            weight, n, m, dims[name], ranking.earlier.get(name), values.get(name)
        )
        for name, weight in chosen.items()
    }
    return _counted(masks, chosen, ranking)


def _are_pruned_together(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> bool:
    """Whether `device_pruning` can process all weights in one launch."""
    return has_kernels([*weights.values(), *values.values()]) and not _overlap(weights.values())


def _overlap(weights: Iterable[Tensor]) -> bool:
    """Whether weights share memory, which the programs of one launch would read and write."""
    spans = []
    for weight in weights:
        if weight.numel():
            pairs = zip(weight.shape, weight.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in pairs)
            begin = weight.data_ptr()
            spans.append((begin, begin + (last + 1) * weight.element_size()))
    spans.sort()
    return any(begin < end for (_, end), (begin, _) in pairwise(spans))


def _removal(names: list[str], found: device_pruning.Pruned) -> Removal:
    return Removal(
        masks=dict(zip(names, found.masks, strict=True)),
        kept_zeros=dict(zip(names, found.kept_zeros, strict=True)),
        num_removed=sum(found.removed),
    )


def _counted(
    masks: dict[str, Tensor], may_keep_zeros: Mapping[str, Tensor], ranking: Ranking
) -> Removal:
    kept_zeros = {
        name: int(masks[name].count_nonzero()) - int(weight.count_nonzero())
        for name, weight in may_keep_zeros.items()
    }
    removed = None
    if ranking.earlier:
        removed = sum(int((~mask).count_nonzero()) for mask in masks.values())
    return Removal(masks=masks, kept_zeros=kept_zeros, num_removed=removed)
