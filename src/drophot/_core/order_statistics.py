"""What stands at a rank among very many numbers, exactly, without sorting or copying them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 20  # numbers looked at in one go: they stay in the cache, and memory stays small
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_REMOVED = -1  # the key of what an earlier pruning removed: below every magnitude

Keys = Callable[
    [], Iterable[Tensor]
]  # the integers of one tensor, block by block, from the start at each call


class Place(NamedTuple):
    """The key that stands at a rank; of the `tied` ones that equal it `before` come up to there."""

    key: int
    before: int
    tied: int


class Edge(NamedTuple):
    """Magnitudes below `place.key` go, and `place.before` of those that equal it."""

    dtype: torch.dtype  # the magnitudes are compared in this one
    place: Place


def nth(values: Tensor, rank: int) -> Tensor:
    """The number that stands at a rank in ascending order.

    Args:
        values: Floats of 32 bits or more without NaN, or integers; one dimension.
        rank: From 0.

    Returns:
        The number, of the values' dtype, without dimensions.
    """
    if values.is_floating_point():
        place = _place([lambda: map(_ordered, _blocks(values))], values.dtype.itemsize, rank + 1)
        key = torch.tensor(place.key, dtype=_INTEGERS[values.dtype.itemsize])
        return _turn(key).view(values.dtype)
    low, high = (int(value) for value in values.aminmax())
    width = next(w for w in _INTEGERS if -(1 << (8 * w - 1)) <= low and high < 1 << (8 * w - 1))
    dtype = _INTEGERS[width]
    place = _place([lambda: (block.to(dtype) for block in _blocks(values))], width, rank + 1)
    return torch.tensor(place.key, dtype=values.dtype)


def edge(weights: Sequence[Tensor], remove: int, older: Sequence[Tensor | None] = ()) -> Edge:
    """Find the magnitude below which `remove` of all weights lie.

    Args:
        weights: Finite float tensors of 16 bits or more.
        remove: How many of their elements are to go.
        older: For each weight the mask of an earlier pruning, or `None`. Zeros that it removed are
            the first to go, before all others, and all of them do, even if they are more.

    Returns:
        The edge.
    """
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights))
    pairs = zip(weights, older or [None] * len(weights), strict=True)
    sources = [partial(_keys, weight, dtype, mask) for weight, mask in pairs]
    place = _place(sources, dtype.itemsize, remove)
    return Edge(dtype, place._replace(before=place.tied) if place.key == _REMOVED else place)


def counts(edge: Edge, weights: Sequence[Tensor], older: Sequence[Tensor | None] = ()) -> list[int]:
    """How many of each weight a cutter would remove, if it met them in this order.

    Args:
        edge: From `edge`.
        weights: The tensors; they are left as they are.
        older: As it was given to `edge`.

    Returns:
        A number for each.
    """
    below, ties = [], []
    for weight, mask in zip(weights, older or [None] * len(weights), strict=True):
        less = tied = torch.zeros((), dtype=torch.int64, device=weight.device)
        for keys in _keys(weight, edge.dtype, mask):
            less = less + (keys < edge.place.key).sum()
            tied = tied + (keys == edge.place.key).sum()
        below.append(int(less))
        ties.append(int(tied))
    more = spread(ties, edge.place.before)
    return [less + tied for less, tied in zip(below, more, strict=True)]


def spread(sizes: Iterable[int], amount: int) -> list[int]:
    """Divide an amount over groups that come one after the other, as a cutter divides ties.

    Args:
        sizes: Of the groups.
        amount: At most their sum.

    Returns:
        The part of each.
    """
    ends = [0, *accumulate(sizes)]
    parts = [end * amount // max(ends[-1], 1) for end in ends]
    return [after - before for before, after in pairwise(parts)]


def cutter(edge: Edge) -> Callable[..., Tensor]:
    """A function that cuts one weight after the other at the edge.

    Of the ties that stand at the edge those that go are spread evenly over all that it meets, so
    that no layer loses more than its share because it comes first.

    Args:
        edge: From `edge`.

    Returns:
        Takes a weight, and the mask of an earlier pruning if there is one, sets what lies below the
        edge to zero, in place, and gives the mask of what is kept: bool, of the weight's shape,
        contiguous.
    """
    key, removed, tied = edge.place
    met = 0  # ties so far

    def cut(weight: Tensor, older: Tensor | None = None) -> Tensor:
        nonlocal met
        weight = weight.detach()
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        flat = weight.reshape(-1)
        for keys, block, keep in zip(
            _keys(flat, edge.dtype, older),
            flat.split(_BLOCK),
            mask.view(-1).split(_BLOCK),
            strict=True,
        ):
            torch.gt(keys, key, out=keep)
            if removed < tied:
                ties = (keys == key).nonzero()[:, 0]
                number = torch.arange(met, met + len(ties), device=ties.device) * removed
                keep[ties] = (number + removed) // tied == number // tied
                met += len(ties)
            block.masked_fill_(~keep, 0)
        if not weight.is_contiguous():
            weight.copy_(flat.view(weight.shape))
        return mask

    return cut


def magnitudes(weight: Tensor, older: Tensor | None = None) -> Tensor:
    """Integers in the order of the magnitudes.

    Args:
        weight: Finite floats of 16 bits or more.
        older: The mask of an earlier pruning.

    Returns:
        A new tensor, one dimension: the bits without the sign, -1 for a zero that the older mask
        removed.
    """
    keys = torch.empty(weight.numel(), dtype=_INTEGERS[weight.dtype.itemsize], device=weight.device)
    for block, part in zip(_keys(weight, weight.dtype, older), keys.split(_BLOCK), strict=True):
        part.copy_(block)
    return keys


def _place(sources: Sequence[Keys], width: int, rank: int) -> Place:
    """The key at a rank (from 1) among signed integers of `width` bytes."""
    # A histogram of their first 16 bits tells in which of 65,536 ranges it is, and the next 16
    # divide that one: two passes for 32 bits, whatever the distribution, without a copy.
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
        # The first digit counts from the most negative integer.
        prefix = digit - (1 << 15) if shift == top else prefix << 16 | digit
    return Place(prefix, max(rank, 0), tied)


def _histogram(source: Keys, shift: int, prefix: int | None) -> Tensor:
    """How many keys have each value of the 16 bits at `shift`, given those above."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for keys in source():
        counts = counts.to(keys.device)
        if prefix is None:
            digits = (keys >> shift).int() + (1 << 15)
        else:
            digits = (keys[keys >> (shift + 16) == prefix] >> shift) & 0xFFFF
        counts += torch.bincount(digits, minlength=1 << 16)
    return counts.cpu()


def _keys(weight: Tensor, dtype: torch.dtype, older: Tensor | None) -> Iterator[Tensor]:
    """The magnitudes of a weight in a dtype, block by block; -1 for what is removed already."""
    if older is None:
        return (_magnitude(block.to(dtype)) for block in _blocks(weight))
    return (
        _magnitude(block.to(dtype)).masked_fill_(~mask & (block == 0), _REMOVED)
        for block, mask in zip(_blocks(weight), _blocks(older), strict=True)
    )


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.detach().reshape(-1).split(_BLOCK)


def _magnitude(block: Tensor) -> Tensor:
    """The bits without the sign: integers in the order of the magnitudes."""
    integer = _INTEGERS[block.dtype.itemsize]
    return block.view(integer) & torch.iinfo(integer).max


def _ordered(block: Tensor) -> Tensor:
    """Integers in the order of the floats, -0 and 0 equal."""
    return _turn((block + 0.0).view(_INTEGERS[block.dtype.itemsize]))


def _turn(bits: Tensor) -> Tensor:
    """Negative floats' bits in reverse order; its own inverse."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & torch.iinfo(bits.dtype).max)
