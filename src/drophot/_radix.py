"""What stands at a rank among very many numbers, exactly, without sorting or copying them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 20  # numbers looked at in one go: they stay in the cache, and memory stays small
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        place = _place([values], _ordered, values.dtype.itemsize, rank + 1)
        key = torch.tensor(place.key, dtype=_INTEGERS[values.dtype.itemsize])
        return _turn(key).view(values.dtype)
    low, high = (int(value) for value in values.aminmax())
    width = next(w for w in _INTEGERS if -(1 << (8 * w - 1)) <= low and high < 1 << (8 * w - 1))
    place = _place([values], lambda block: block.to(_INTEGERS[width]), width, rank + 1)
    return torch.tensor(place.key, dtype=values.dtype)


def edge(weights: Sequence[Tensor], remove: int) -> Edge:
    """Find the magnitude below which `remove` of all weights lie.

    Args:
        weights: Finite float tensors of 16 bits or more.
        remove: How many of their elements are to go.

    Returns:
        The edge. All zeros are on the removed side of it, even if they are more.
    """
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights))
    place = _place(weights, lambda block: _magnitude(block.to(dtype)), dtype.itemsize, remove)
    return Edge(dtype, place._replace(before=place.tied) if place.key == 0 else place)


def cutter(edge: Edge) -> Callable[[Tensor], Tensor]:
    """A function that cuts one weight after the other at the edge.

    Of the ties that stand at the edge those that go are spread evenly over all that it meets, so
    that no layer loses more than its share because it comes first.

    Args:
        edge: From `edge`.

    Returns:
        Takes a weight, sets what lies below the edge to zero, in place, and gives the mask of what
        is kept: bool, of the weight's shape, contiguous.
    """
    key, removed, tied = edge.place
    met = 0  # ties so far

    def cut(weight: Tensor) -> Tensor:
        nonlocal met
        weight = weight.detach()
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        flat = weight.reshape(-1)
        for block, keep in zip(flat.split(_BLOCK), mask.view(-1).split(_BLOCK), strict=True):
            keys = _magnitude(block.to(edge.dtype))
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


def _place(
    tensors: Iterable[Tensor], to_keys: Callable[[Tensor], Tensor], width: int, rank: int
) -> Place:
    """The key at a rank (from 1) among signed integers of `width` bytes."""
    # A histogram of their first 16 bits tells in which of 65,536 ranges it is, and the next 16
    # divide that one: two passes for 32 bits, whatever the distribution, without a copy.
    top = 8 * width - 16
    prefix = tied = 0
    for shift in range(top, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in tensors:
            counts += _histogram(tensor, to_keys, shift, prefix if shift < top else None)
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, max(rank, 1)))
        tied = int(counts[digit])
        rank -= int(upto[digit]) - tied
        # The first digit counts from the most negative integer.
        prefix = digit - (1 << 15) if shift == top else prefix << 16 | digit
    return Place(prefix, max(rank, 0), tied)


def _histogram(
    tensor: Tensor, to_keys: Callable[[Tensor], Tensor], shift: int, prefix: int | None
) -> Tensor:
    """How many keys have each value of the 16 bits at `shift`, given those above."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=tensor.device)
    for block in _blocks(tensor):
        keys = to_keys(block)
        if prefix is None:
            digits = (keys >> shift).int() + (1 << 15)
        else:
            digits = (keys[keys >> (shift + 16) == prefix] >> shift) & 0xFFFF
        counts += torch.bincount(digits, minlength=1 << 16)
    return counts.cpu()


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
