"""Order statistics of many numbers, exactly, without sorting or copying them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from drophot._core import radix_select
from drophot._core.block_threads import block_at, map_blocks, map_threads
from drophot._core.float_keys import INTEGERS, FloatKeys, removed_key
from drophot._core.sampled_select import Group, values_at_ranks


class Threshold(NamedTuple):
    """Magnitudes with smaller keys are removed, and `ties_removed` of the `ties` equal ones."""

    dtype: torch.dtype  # in which magnitudes are compared
    key: int
    ties_removed: int
    ties: int
    signed: bool  # whether values are compared with their signs, instead of by magnitude


class Layers(NamedTuple):
    """Weights that are ranked together, and how many of their elements are removed.

    The weights are finite float tensors of 16 bits or more. `earlier` has for each of them the mask
    of an earlier pruning, or `None`, and is empty if there are none. The zeros that these masks
    removed are removed first, and all of them are, even if they are more than `remove`.
    """

    weights: Sequence[Tensor]
    remove: int
    earlier: Sequence[Tensor | None] = ()

    def pairs(self) -> Iterable[tuple[Tensor, Tensor | None]]:
        return zip(self.weights, self.earlier or [None] * len(self.weights), strict=True)


def kth_value(values: Tensor, rank: int) -> Tensor:
    """The value at `rank` (from 0) in ascending order, as a tensor without dimensions.

    `values` is one-dimensional: floats of 32 bits or more without NaN, or integers.
    """
    array = values.detach().resolve_neg().cpu().numpy()
    (found,) = values_at_ranks([Group([array], rank)])
    # A zero is returned without a sign.
    return torch.tensor(found.value.item() + 0, dtype=values.dtype)


def magnitude_thresholds(groups: Sequence[Layers], *, signed: bool = False) -> list[Threshold]:
    """For each group the threshold that separates the smallest magnitudes of its weights.

    With `signed`, values are compared with their signs, instead of by magnitude.
    """
    dtypes = [reduce(torch.promote_types, (w.dtype for w in group.weights)) for group in groups]
    ranked = values_at_ranks([
        Group(
            [FloatKeys(w, dtype=dtype, earlier=m, signed=signed) for w, m in group.pairs()],
            max(group.remove, 1) - 1,
        )
        for group, dtype in zip(groups, dtypes, strict=True)
    ])
    found = []
    for group, dtype, (value, below, ties) in zip(groups, dtypes, ranked, strict=True):
        all_ties = value == removed_key(dtype, signed=signed)
        ties_removed = ties if all_ties else max(group.remove - below, 0)
        found.append(Threshold(dtype, int(value), ties_removed, ties, signed))
    return found


def magnitude_threshold(layers: Layers, *, signed: bool = False) -> Threshold:
    """The threshold that separates the smallest magnitudes of all weights, on any device."""
    if radix_select.has_kernels(layers.weights):
        return _threshold_on_device(layers, signed)
    (found,) = magnitude_thresholds([layers], signed=signed)
    return found


def count_removed(threshold: Threshold, layers: Layers) -> list[int]:
    """How many elements of each weight `prune` removes if these are all weights of a group."""
    if radix_select.has_kernels(layers.weights):
        counts = _counts_on_device(threshold, layers)
    else:
        dtype, key, _, _, signed = threshold
        keys = [FloatKeys(w, dtype=dtype, earlier=m, signed=signed) for w, m in layers.pairs()]

        def count(number: int, block: slice) -> tuple[int, int]:
            found = keys[number][block]
            return int(np.count_nonzero(found < key)), int(np.count_nonzero(found == key))

        counts = [
            np.sum(own or [(0, 0)], axis=0).tolist() for own in map_blocks(count, map(len, keys))
        ]
    more = divide_evenly((tied for _, tied in counts), threshold.ties_removed)
    return [less + tied for (less, _), tied in zip(counts, more, strict=True)]


def prune_below(
    groups: Sequence[Layers],
    thresholds: Sequence[Threshold],
    weights: Sequence[Sequence[Tensor]] | None = None,
) -> list[list[Tensor]]:
    """Set the elements below each group's threshold to zero in place, and return the masks.

    A mask is `True` for kept elements: bool, contiguous, of the weight's shape. Ties at the
    threshold are broken so that the removed elements are spread evenly among all ties of the group,
    in the order of its weights; no layer loses more than its share because it comes first.

    Args:
        groups: What is compared with the thresholds.
        thresholds: From `magnitude_thresholds`.
        weights: The weights that are pruned, if they are not compared themselves.
    """
    parts = [
        [
            _PrunedWeight(weight, values, mask, threshold)
            for weight, (values, mask) in zip(pruned, group.pairs(), strict=True)
        ]
        for group, pruned, threshold in zip(
            groups, weights or [group.weights for group in groups], thresholds, strict=True
        )
    ]
    flat = [part for own in parts for part in own]
    ties = iter(map_blocks(lambda n, block: flat[n].prune(block), [len(p.keys) for p in flat]))
    tied: list[tuple[_PrunedWeight, slice, int]] = []
    for own in parts:
        seen = 0
        for part in own:
            for number, count in enumerate(next(ties)):
                if count:
                    tied.append((part, block_at(number, len(part.keys)), seen))
                seen += count
    map_threads(lambda item: item[0].break_ties(*item[1:]), tied)
    return [[part.finished() for part in own] for own in parts]


class _PrunedWeight:
    """A weight that is pruned block by block."""

    def __init__(
        self, weight: Tensor, values: Tensor, earlier: Tensor | None, threshold: Threshold
    ) -> None:
        self.keys = FloatKeys(
            values, dtype=threshold.dtype, earlier=earlier, signed=threshold.signed
        )
        self._threshold = threshold
        self._weight = weight.detach()
        self._mask = torch.empty(weight.shape, dtype=torch.bool)
        self._keep = self._mask.view(-1).numpy()
        self._bits: NDArray[Any] | None = None  # of a weight whose memory is in order
        if weight.device.type == "cpu" and weight.is_contiguous():
            self._bits = self._weight.view(INTEGERS[weight.dtype.itemsize]).view(-1).numpy()

    def prune(self, block: slice) -> int:
        """Prune a block without ties; of another one the number of ties, which are not broken."""
        keys = self.keys[block]
        np.greater(keys, self._threshold.key, out=self._keep[block])
        ties = 0
        if self._threshold.ties_removed < self._threshold.ties:
            ties = int(np.count_nonzero(keys == self._threshold.key))
        if not ties:
            self._zero(block)
        return ties

    def break_ties(self, block: slice, seen: int) -> None:
        """Break the ties of a block; `seen` is the number of ties before it."""
        _, key, removed, tied, _ = self._threshold
        ties = np.flatnonzero(self.keys[block] == key)
        number = np.arange(seen, seen + len(ties)) * removed
        self._keep[block][ties] = (number + removed) // tied == number // tied
        self._zero(block)

    def finished(self) -> Tensor:
        """The mask on the weight's device, when all blocks are done."""
        weight, mask = self._weight, self._mask.to(self._weight.device)
        if self._bits is None:
            weight.masked_fill_(~mask, 0)
        elif not weight.is_inference():
            increment_version(weight)  # as an operation of torch does, for the checks of autograd
        return mask

    def _zero(self, block: slice) -> None:
        if self._bits is not None:
            # Bits times 0 are those of 0 without a sign.
            np.multiply(self._bits[block], self._keep[block], out=self._bits[block])


def divide_evenly(sizes: Iterable[int], amount: int) -> list[int]:
    """Divide `amount` over consecutive groups of these sizes, as `prune_below` divides ties."""
    ends = [0, *accumulate(sizes)]
    parts = [end * amount // max(ends[-1], 1) for end in ends]
    return [after - before for before, after in pairwise(parts)]


def largest_keys(weights: Sequence[Tensor]) -> list[int]:
    """The key of the largest magnitude of each weight: 0 if all are zero.

    It is at least the `infinite_key` if a weight is not finite.
    """
    keys = [FloatKeys(weight) for weight in weights]
    found = map_blocks(lambda n, block: int(keys[n][block].max()), map(len, keys))
    return [max(own, default=0) for own in found]


def _threshold_on_device(layers: Layers, signed: bool) -> Threshold:
    table, keys = _table_and_keys(layers, signed)
    (row,) = radix_select.find_thresholds(table, keys, [layers.remove]).tolist()
    key, below, ties, _ = row
    dtype = keys.dtype or torch.float32
    # The unsigned keys of the device begin at 0, for a weight that an earlier mask removed.
    lowest = removed_key(dtype, signed=signed)
    key = key % (1 << keys.width) + lowest
    return Threshold(dtype, key, ties if key == lowest else below, ties, signed)


def _counts_on_device(threshold: Threshold, layers: Layers) -> list[list[int]]:
    """How many elements of each weight are below the threshold, and how many equal it."""
    table, keys = _table_and_keys(layers, threshold.signed)
    key = threshold.key - removed_key(threshold.dtype, signed=threshold.signed)
    key -= 1 << 64 if key >> 63 else 0  # its bits in an int64
    state = torch.tensor([[key, 0, 0, 0]]).to(table.rows.device)
    return table.by_tensor(radix_select.count_below(table, keys, state)).tolist()


def _table_and_keys(
    layers: Layers, signed: bool
) -> tuple[radix_select.TensorTable, radix_select.Keys]:
    weights = [radix_select.addressable(weight) for weight in layers.weights]
    table = radix_select.tensor_table(weights, [0] * len(weights), earlier=layers.earlier)
    keys = radix_select.float_keys((weight.dtype for weight in weights), signed=signed)
    return table, keys
