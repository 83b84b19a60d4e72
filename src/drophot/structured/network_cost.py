"""The parameters, bytes and operations of a network without some channels, before any is cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from drophot._core.interruptions import must_propagate
from drophot.structured.dependency_graph import Axis, DependencyGraph, Shape
from drophot.structured.recorded_call import RecordedCall

Rows = list[tuple[int, Tensor]]  # by dimension: the entries along it


class NetworkCost:
    """Computes what a network costs without some entries, from shapes alone.

    Parameters and bytes are exact. Operations are those of the recorded calls, by the formulas of
    `summary`, which sees the same products unless a library computes several of them at once.

    Args:
        model: The network.
        graph: The entries of its tensors.
        calls: The recorded calls in evaluation mode.
    """

    def __init__(
        self, model: nn.Module, graph: DependencyGraph, calls: Sequence[RecordedCall]
    ) -> None:
        self._parameters = {
            name: (
                tuple(parameter.shape),
                _rows(graph.axes.get(parameter) or ()),
                parameter.itemsize,
            )
            for name, parameter in model.named_parameters()
        }
        self._products = []
        for call in calls:
            if call.product is None:
                continue
            inputs = [
                (shape, _rows(axes))
                for shape, axes in zip(call.product.inputs, call.input_axes, strict=False)
            ]
            outputs = [
                (shape, _rows(axes))
                for shape, axes in zip(call.shapes, call.output_axes, strict=False)
            ]
            try:
                flops = call.product.flops(call.product.inputs, call.shapes)
            except Exception as error:  # the formula does not support these arguments
                if must_propagate(error):
                    raise
                continue
            self._products.append((call.product, inputs, outputs, flops))

    def of(self, what: str, removed: Tensor) -> int:
        """The number of parameters, bytes or FLOPs without the removed entries."""
        if what == "flops":
            return self.flops(removed)
        return sum(self.by_parameter(what, removed).values())

    def by_parameter(self, what: str, removed: Tensor) -> dict[str, int]:
        """The elements or bytes of each parameter without the removed entries, by name."""
        return {
            name: prod(_shape(shape, rows, removed)) * (size if what == "bytes" else 1)
            for name, (shape, rows, size) in self._parameters.items()
        }

    def flops(self, removed: Tensor) -> int:
        """The operations of the recorded calls without the removed entries."""
        total = 0
        for product, inputs, outputs, flops in self._products:
            if any(bool(removed[row].any()) for _, rows in (*inputs, *outputs) for _, row in rows):
                flops = product.flops(
                    [_shape(shape, rows, removed) for shape, rows in inputs],
                    [_shape(shape, rows, removed) for shape, rows in outputs],
                )
            total += flops
        return total


def _rows(axes: Iterable[Axis]) -> Rows:
    """One row of entries along each axis; the other rows lose equally many."""
    return [(axis.dim, axis.row()) for axis in axes]


def _shape(shape: Shape, rows: Rows, removed: Tensor) -> torch.Size:
    sizes = list(shape)
    for dim, row in rows:
        sizes[dim] = len(row) - int(removed[row].sum())
    return torch.Size(sizes)
