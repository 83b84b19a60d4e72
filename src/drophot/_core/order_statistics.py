"""Order statistics of many numbers, exactly, without sorting or copying them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from drophot._core import radix_select, sampled_select

# Numbers processed at a time. They fit in the cache of a CPU. Other devices need larger blocks,
# since each takes several launches, but a bound on the memory as well.
_BLOCK = 1 << 20
_LARGE_BLOCK = 1 << 26
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# The integer keys of one tensor, block by block, from the start at each call.
Keys = Callable[[], Iterable[Tensor]]


class RankedKey(NamedTuple):
    """The key at a rank, and how many of the `ties` equal keys are up to that rank."""

    key: int
    ties_below: int
    ties: int


class Threshold(NamedTuple):
    """Magnitudes with smaller keys are removed, and `ties_removed` of the `ties` equal ones."""

    dtype: torch.dtype  # in which magnitudes are compared
    key: int
    ties_removed: int
    ties: int
    signed: bool  # whether values are compared with their signs, instead of by magnitude


def kth_value(values: Tensor, rank: int) -> Tensor:
    """The value at `rank` (from 0) in ascending order, as a tensor without dimensions.

    `values` is one-dimensional: floats of 32 bits or more without NaN, or integers.
    """
    if values.device.type == "cpu" and len(values) >= sampled_select.MIN_LENGTH:
        found = sampled_select.kth_value(values.detach().resolve_neg().numpy(), rank)
        if found is not None:
            return torch.tensor(found.item(), dtype=values.dtype)
    if values.is_floating_point():
        found = _key_at([lambda: map(_ordered, _blocks(values))], values.dtype.itemsize, rank + 1)
        key = torch.tensor(found.key, dtype=_INTEGERS[values.dtype.itemsize])
        return _flip_negative(key).view(values.dtype)
    low, high = (int(value) for value in values.aminmax())
    width = next(w for w in _INTEGERS if -(1 << (8 * w - 1)) <= low and high < 1 << (8 * w - 1))
    dtype = _INTEGERS[width]
    found = _key_at([lambda: (block.to(dtype) for block in _blocks(values))], width, rank + 1)
    return torch.tensor(found.key, dtype=values.dtype)


def magnitude_threshold(
    weights: Sequence[Tensor],
    remove: int,
    earlier: Sequence[Tensor | None] = (),
    *,
    signed: bool = False,
) -> Threshold:
    """The threshold that separates the `remove` smallest magnitudes of all weights.

    Args:
        weights: Finite float tensors of 16 bits or more.
        remove: How many of their elements to remove.
        earlier: For each weight the mask of an earlier pruning, or `None`. The zeros that it
            removed are removed first, and all of them are, even if they are more than `remove`.
        signed: Compare the values with their signs, instead of by magnitude.
    """
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights))
    if radix_select.has_kernels(weights):
        return _threshold_on_device(weights, remove, earlier, signed)
    pairs = zip(weights, earlier or [None] * len(weights), strict=True)
    sources = [partial(_keys, weight, dtype, mask, signed) for weight, mask in pairs]
    key, below, ties = _key_at(sources, dtype.itemsize, remove)
    all_ties = key == _removed_key(dtype, signed)
    return Threshold(dtype, key, ties if all_ties else below, ties, signed)


def count_removed(
    threshold: Threshold, weights: Sequence[Tensor], earlier: Sequence[Tensor | None] = ()
) -> list[int]:
    """How many elements of each weight a `pruner` removes if it is called in this order."""
    if radix_select.has_kernels(weights):
        counts = _counts_on_device(threshold, weights, earlier)
        more = divide_evenly((tied for _, tied in counts), threshold.ties_removed)
        return [less + tied for (less, _), tied in zip(counts, more, strict=True)]
    below, ties = [], []
    for weight, mask in zip(weights, earlier or [None] * len(weights), strict=True):
        less = tied = torch.zeros((), dtype=torch.int64, device=weight.device)
        for keys in _keys(weight, threshold.dtype, mask, threshold.signed):
            less = less + (keys < threshold.key).sum()
            tied = tied + (keys == threshold.key).sum()
        below.append(int(less))
        ties.append(int(tied))
    more = divide_evenly(ties, threshold.ties_removed)
    return [less + tied for less, tied in zip(below, more, strict=True)]


def _threshold_on_device(
    weights: Sequence[Tensor], remove: int, earlier: Sequence[Tensor | None], signed: bool
) -> Threshold:
    table, keys = _table_and_keys(weights, earlier, signed)
    (row,) = radix_select.find_thresholds(table, keys, [remove]).tolist()
    key, below, ties, _ = row
    dtype = keys.dtype or torch.float32
    # The unsigned keys of the device begin at 0, for a weight that an earlier mask removed.
    key = key % (1 << keys.width) + _removed_key(dtype, signed)
    all_ties = key == _removed_key(dtype, signed)
    return Threshold(dtype, key, ties if all_ties else below, ties, signed)


def _counts_on_device(
    threshold: Threshold, weights: Sequence[Tensor], earlier: Sequence[Tensor | None]
) -> list[list[int]]:
    """How many elements of each weight are below the threshold, and how many equal it."""
    table, keys = _table_and_keys(weights, earlier, threshold.signed)
    key = threshold.key - _removed_key(threshold.dtype, threshold.signed)
    key -= 1 << 64 if key >> 63 else 0  # its bits in an int64
    state = torch.tensor([[key, 0, 0, 0]]).to(table.rows.device)
    return table.by_tensor(radix_select.count_below(table, keys, state)).tolist()


def _table_and_keys(
    weights: Sequence[Tensor], earlier: Sequence[Tensor | None], signed: bool
) -> tuple[radix_select.TensorTable, radix_select.Keys]:
    weights = [radix_select.addressable(weight) for weight in weights]
    table = radix_select.tensor_table(weights, [0] * len(weights), earlier=earlier)
    keys = radix_select.float_keys((weight.dtype for weight in weights), signed=signed)
    return table, keys


def divide_evenly(sizes: Iterable[int], amount: int) -> list[int]:
    """Divide `amount` over consecutive groups of these sizes, as a `pruner` divides ties."""
    ends = [0, *accumulate(sizes)]
    parts = [end * amount // max(ends[-1], 1) for end in ends]
    return [after - before for before, after in pairwise(parts)]


def pruner(threshold: Threshold) -> Callable[..., Tensor]:
    """A function that prunes one weight after the other at the threshold.

    It takes a weight and optionally the mask of an earlier pruning and the values by which the
    weights are compared, if not by themselves. It sets weights below the threshold to zero in place
    and returns the mask of the kept ones: bool, contiguous, of the weight's shape. Ties at the
    threshold are broken so that the removed weights are spread evenly among all ties, in the order
    of the calls; no layer loses more than its share because it comes first.
    """
    dtype, key, removed, tied, signed = threshold
    seen = 0  # ties in earlier calls and blocks

    def prune(
        weight: Tensor, earlier: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        nonlocal seen
        weight = weight.detach()
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        flat = weight.reshape(-1)
        for keys, block, keep in zip(
            _keys(flat if values is None else values, dtype, earlier, signed),
            _blocks(flat),
            _blocks(mask),
            strict=True,
        ):
            torch.gt(keys, key, out=keep)
            if removed < tied:
                ties = (keys == key).nonzero()[:, 0]
                number = torch.arange(seen, seen + len(ties), device=ties.device) * removed
                keep[ties] = (number + removed) // tied == number // tied
                seen += len(ties)
            block.masked_fill_(~keep, 0)
        if not weight.is_contiguous():
            weight.copy_(flat.view(weight.shape))
        return mask

    return prune


def magnitude_keys(weight: Tensor, earlier: Tensor | None = None) -> Tensor:
    """A new one-dimensional tensor of integers that are ordered like the magnitudes.

    They are the bits of the finite floats without the sign; -1 for a zero that `earlier` removed.
    """
    keys = torch.empty(weight.numel(), dtype=_INTEGERS[weight.dtype.itemsize], device=weight.device)
    for block, part in zip(_keys(weight, weight.dtype, earlier), _blocks(keys), strict=True):
        part.copy_(block)
    return keys


def _key_at(sources: Sequence[Keys], width: int, rank: int) -> RankedKey:
    """The key at a rank (from 1) among signed integers of `width` bytes."""
    # Radix selection: a histogram of the first 16 bits finds which of 65,536 ranges the key is in,
    # and the next 16 bits divide that range. That is two passes for 32 bits, without a copy,
    # whatever the distribution.
    top = 8 * width - 16
    prefix = tied = 0
    for shift in range(top, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for source in sources:
            counts += _histogram(source, shift, prefix if shift < top else None)
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, max(rank, 1)))
        tied = int(counts[digit])
        rank -= int(upto[digit]) - tied
        # The first digit is counted from the most negative integer.
        prefix = digit - (1 << 15) if shift == top else prefix << 16 | digit
    return RankedKey(prefix, max(rank, 0), tied)


def _histogram(source: Keys, shift: int, prefix: int | None) -> Tensor:
    """How many keys with this prefix have each value of the 16 bits at `shift`."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for keys in source():
        counts = counts.to(keys.device)
        if prefix is None:
            digits = (keys >> shift).int() + (1 << 15)
        else:
            digits = (keys[keys >> (shift + 16) == prefix] >> shift) & 0xFFFF
        counts += torch.bincount(digits, minlength=1 << 16)
    return counts.cpu()


def _keys(
    weight: Tensor, dtype: torch.dtype, earlier: Tensor | None, signed: bool = False
) -> Iterator[Tensor]:
    """Integers in the order of the magnitudes or signed values in a dtype, block by block."""
    key = _ordered if signed else _magnitude
    if earlier is None:
        return (key(block.to(dtype)) for block in _blocks(weight))
    removed = _removed_key(dtype, signed)
    return (
        key(block.to(dtype)).masked_fill_(~mask & (block == 0), removed)
        for block, mask in zip(_blocks(weight), _blocks(earlier), strict=True)
    )


def _removed_key(dtype: torch.dtype, signed: bool) -> int:
    """The key of a weight that an earlier pruning removed: below that of every finite float."""
    return torch.iinfo(_INTEGERS[dtype.itemsize]).min if signed else -1


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    size = _BLOCK if tensor.device.type == "cpu" else _LARGE_BLOCK
    yield from tensor.detach().reshape(-1).split(size)


def _magnitude(block: Tensor) -> Tensor:
    """The bits without the sign: integers in the order of the magnitudes."""
    integer = _INTEGERS[block.dtype.itemsize]
    return block.view(integer) & torch.iinfo(integer).max


def _ordered(block: Tensor) -> Tensor:
    """Integers in the order of the floats, with -0 and 0 equal."""
    return _flip_negative((block + 0.0).view(_INTEGERS[block.dtype.itemsize]))


def _flip_negative(bits: Tensor) -> Tensor:
    """Reverse the order of the bits of negative floats; its own inverse."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)
