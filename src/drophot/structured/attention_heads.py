"""Attention whose heads cannot lose channels one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from drophot.structured.recorded_call import RecordedCall

VIEWS = ("view", "_unsafe_view", "reshape")


class WholeHeads(Exception):  # noqa: N818 (a request to start again, not an error)
    """These heads have to be removed as a whole, or cannot be removed if not `possible`."""

    def __init__(self, heads: set[tuple[str, int]], possible: bool) -> None:
        super().__init__()
        self.heads = heads
        self.possible = possible


def scaled_heads(
    calls: Sequence[RecordedCall],
    failures: Collection[int],
    removed: Tensor,
    calls_in: Mapping[str, Sequence[int]],
) -> Iterator[tuple[str, int]]:
    """Heads whose width determines a number that must not change, such as the scale of attention.

    Args:
        calls: The recorded calls.
        failures: The numbers of the calls that failed.
        removed: Whether each entry is removed.
        calls_in: The numbers of the calls in each module.

    Yields:
        The module's path and the width of its heads.
    """
    for number in failures:
        call = calls[number]
        if not call.numbers or not any(isinstance(n, float) for n in call.numbers):
            continue
        here = [n for n in calls_in[call.path[-1]] if n < number and calls[n].path == call.path]
        near = [calls[n] for n in here if "mm" in calls[n].name][-1:]
        mixed = [axis for axis in call.inputs if removed[axis.ids].any()]
        views = [calls[n] for n in here if calls[n].name in VIEWS]
        for axis in mixed or [axis for c in near for axis in c.inputs]:
            width = axis.ids.size(axis.dim)
            if (
                axis.dim >= axis.ids.dim() - 2
                and removed[axis.ids].any()
                and any(_makes_heads(view, width) for view in views)
            ):
                yield call.path[-1], width


def _makes_heads(view: RecordedCall, width: int) -> bool:
    """Whether a reshape makes several rows of this width with different entries."""
    return any(
        axis.dim == len(shape) - 1 and shape[axis.dim] == width and axis.ids.numel() > width
        for made, shape in zip(view.output_axes, view.shapes, strict=True)
        for axis in made
    )


def all_heads(calls: Sequence[RecordedCall]) -> set[tuple[str, int]]:
    """The modules that compute attention with several heads, and the widths of their heads."""
    found = set()
    for number, call in enumerate(calls):
        if "softmax" not in call.name:
            continue
        here = [n for n, other in enumerate(calls) if other.path == call.path]
        products = [n for n in here if "mm" in calls[n].name]
        near = [n for n in products if n < number][-1:] + [n for n in products if n > number][:1]
        views = [calls[n] for n in here if calls[n].name in VIEWS]
        for axis in (axis for n in near for axis in calls[n].inputs):
            width = axis.ids.size(axis.dim)
            if axis.dim >= axis.ids.dim() - 2 and any(_makes_heads(view, width) for view in views):
                found.add((call.path[-1], width))
    return found
