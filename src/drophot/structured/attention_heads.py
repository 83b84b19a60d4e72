"""Heads of attention that cannot get narrower one channel at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from drophot.structured.channel_groups import Pools
from drophot.structured.tracer import Call

VIEWS = ("view", "_unsafe_view", "reshape")


class WholeHeads(Exception):  # noqa: N818 (not for users)
    """Heads cannot get narrower, so that they should go as a whole; or they cannot do that."""

    def __init__(self, heads: set[tuple[str, int]], possible: bool) -> None:
        super().__init__()
        self.heads = heads
        self.possible = possible


def scaled(
    calls: Sequence[Call],
    failures: Collection[int],
    gone: Tensor,
    inside: Mapping[str, Sequence[int]],
) -> Iterator[tuple[str, int]]:
    """Heads whose width a number follows from that should be the same, by their module.

    Args:
        calls: What the network did.
        failures: The calls that do something else.
        gone: The entries that are gone.
        inside: The numbers of the calls in each module.

    Yields:
        The module's path and the width of its heads.
    """
    for number in failures:
        call = calls[number]
        if not call.numbers or not any(isinstance(n, float) for n in call.numbers):
            continue
        here = [n for n in inside[call.path[-1]] if n < number and calls[n].path == call.path]
        near = [calls[n] for n in here if "mm" in calls[n].name][-1:]
        mixed = [axis for axis in call.inputs if gone[axis.ids].any()]
        views = [calls[n] for n in here if calls[n].name in VIEWS]
        for axis in mixed or [axis for c in near for axis in c.inputs]:
            width = axis.ids.size(axis.dim)
            if (
                axis.dim >= axis.ids.dim() - 2
                and gone[axis.ids].any()
                and any(_makes_heads(view, width) for view in views)
            ):
                yield call.path[-1], width


def _makes_heads(view: Call, width: int) -> bool:
    """Whether a reshape makes rows of this width, which lose entries of their own."""
    return any(
        axis.dim == len(shape) - 1 and shape[axis.dim] == width and axis.ids.numel() > width
        for made, shape in zip(view.outputs, view.shapes, strict=True)
        for axis in made
    )


def multiples(
    calls: Sequence[Call], number: int, inside: Mapping[str, Sequence[int]], pools: Pools
) -> Iterator[tuple[int, int]]:
    """Heads of a width that divides that of the stream: both lose a multiple of their number.

    Args:
        calls: What the network did.
        number: The call that does something else.
        inside: The numbers of the calls in each module.
        pools: The channels.

    Yields:
        How often a pool that a tensor's rows consist of is in its last dimensions, and these.
    """
    sizes = torch.bincount(pools.pool)
    known = set(sizes.tolist())
    for n in inside[calls[number].path[-1]]:
        if n < number:
            continue
        for axes, shape in zip(calls[n].outputs, calls[n].shapes, strict=False):
            for axis in axes:
                pool = pools.pool[pools.channel[axis.ids.reshape(-1)[0]]]
                size = int(sizes[pool])
                for start in range(len(shape)):
                    whole = prod(shape[start:])
                    if whole > size > 1 and whole % size == 0 and whole in known:
                        yield whole // size, whole
