"""Which magnitude divides the smallest `k` of many weights from the rest, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 20  # weights looked at in one go: they stay in the cache, and memory stays small
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Edge(NamedTuple):
    """Magnitudes below `key` are removed, and `removed` of the `tied` ones that equal it."""

    dtype: torch.dtype  # the magnitudes are compared in this one
    key: int
    removed: int
    tied: int


def edge(weights: Mapping[str, Tensor], remove: int) -> Edge:
    """Find the edge below which `remove` of all weights lie.

    A non-negative float's bits, read as an integer, are in the order of the floats. A histogram of
    their first 16 tells in which of 65,536 ranges the edge is, and the next 16 divide that one:
    two passes for float32, one for the half precisions, whatever the distribution, and no copy of
    the weights.

    Args:
        weights: Float tensors by name.
        remove: How many of their elements are to go.

    Returns:
        The edge. All zeros are on the removed side of it, even if they are more.

    Raises:
        ValueError: If a weight is not finite.
    """
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
    top = 16 * ((dtype.itemsize * 8 - 1) // 16)
    prefix, rank, tied = 0, remove, 0
    for shift in range(top, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for weight in weights.values():
            counts += _histogram(weight, dtype, shift, prefix if shift < top else None)
        if shift == top:
            infinity = int(_keys(torch.tensor(float("inf"), dtype=dtype)))
            if counts[infinity >> shift :].any():
                raise ValueError(_not_finite(weights))
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, rank))
        tied = int(counts[digit])
        rank -= int(upto[digit]) - tied
        prefix = prefix << 16 | digit
    return Edge(dtype, prefix, tied if prefix == 0 else rank, tied)


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
    met = 0  # ties so far

    def cut(weight: Tensor) -> Tensor:
        nonlocal met
        weight = weight.detach()
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        flat = weight.reshape(-1)
        for block, keep in zip(flat.split(_BLOCK), mask.view(-1).split(_BLOCK), strict=True):
            keys = _keys(block.to(edge.dtype))
            torch.gt(keys, edge.key, out=keep)
            if edge.removed < edge.tied:
                ties = (keys == edge.key).nonzero()[:, 0]
                number = torch.arange(met, met + len(ties), device=ties.device) * edge.removed
                keep[ties] = (number + edge.removed) // edge.tied == number // edge.tied
                met += len(ties)
            block.masked_fill_(~keep, 0)
        if not weight.is_contiguous():
            weight.copy_(flat.view(weight.shape))
        return mask

    return cut


def _histogram(weight: Tensor, dtype: torch.dtype, shift: int, prefix: int | None) -> Tensor:
    """How many magnitudes have each value of the 16 bits at `shift`, given those above."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=weight.device)
    for block in _blocks(weight):
        keys = _keys(block.to(dtype))
        if prefix is not None:
            keys = keys[keys >> (shift + 16) == prefix]
        counts += torch.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16)
    return counts.cpu()


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.detach().reshape(-1).split(_BLOCK)


def _keys(block: Tensor) -> Tensor:
    """The bits without the sign: integers in the order of the magnitudes."""
    integer = _INTEGERS[block.dtype.itemsize]
    return block.view(integer) & torch.iinfo(integer).max


def _not_finite(weights: Mapping[str, Tensor]) -> str:
    for name, weight in weights.items():
        bad = sum(int((~block.isfinite()).sum()) for block in _blocks(weight))
        if bad:
            return (
                f"`model` should have finite weights only. Found {bad} that are NaN or infinite "
                f"in `{name}`; a network that diverged has nothing to rank."
            )
    raise AssertionError("unreachable")
