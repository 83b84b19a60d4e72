"""Attention whose heads cannot lose channels one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import Tensor

from drophot.structured.dependency_graph import Axis
from drophot.structured.recorded_call import RecordedCall
from drophot.structured.similar_calls import SimilarCalls

VIEWS = ("view", "_unsafe_view", "reshape")


class WholeHeads(Exception):  # noqa: N818 (a request to start again, not an error)
    """These heads have to be removed as a whole, or cannot be removed if not `possible`."""

    def __init__(self, heads: set[tuple[str, int]], possible: bool) -> None:
        super().__init__()
        self.heads = heads
        self.possible = possible


def scaled_heads(
    similar: SimilarCalls, failures: Collection[int], removed: Tensor
) -> Iterator[tuple[str, int]]:
    """Heads whose width determines a number that must not change, such as the scale of attention.

    Those of similar modules are included, even if they lost no channels or were not reached.

    Args:
        similar: The recorded calls.
        failures: The numbers of the calls that failed.
        removed: Whether each entry is removed.

    Yields:
        The module's path and the width of its heads.
    """
    for number in failures:
        call = similar.calls[number]
        if not call.numbers or not any(isinstance(n, float) for n in call.numbers):
            continue
        shrinking = any(removed[axis.ids].any() for axis in call.inputs)
        axes = call.inputs if shrinking else _last_product(similar, number)
        widths = _head_widths(similar, number, [a for a in axes if removed[a.ids].any()])
        if not widths:
            continue
        yield from widths
        for _, other in similar.to(call.path[-1], number):
            axes = similar.calls[other].inputs if shrinking else _last_product(similar, other)
            yield from _head_widths(similar, other, axes)


def _before(similar: SimilarCalls, number: int) -> list[RecordedCall]:
    """The calls before another one, in the same module."""
    path = similar.calls[number].path
    here = [similar.calls[n] for n in similar.calls_in[path[-1]] if n < number]
    return [call for call in here if call.path == path]


def _last_product(similar: SimilarCalls, number: int) -> list[Axis]:
    """The axes of the inputs of the last matrix product before a call, in the same module."""
    products = [call for call in _before(similar, number) if "mm" in call.name]
    return [axis for call in products[-1:] for axis in call.inputs]


def _head_widths(similar: SimilarCalls, number: int, axes: Iterable[Axis]) -> list[tuple[str, int]]:
    """The module that a call is in, and the width of each of these axes that is of heads."""
    views = [call for call in _before(similar, number) if call.name in VIEWS]
    widths = []
    for axis in axes:
        width = axis.ids.size(axis.dim)
        if axis.dim >= axis.ids.dim() - 2 and any(_makes_heads(view, width) for view in views):
            widths.append((similar.calls[number].path[-1], width))
    return widths


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
