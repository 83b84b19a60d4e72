"""Rules of operators that move entries: views, slices, concatenations, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from drophot.structured.dependency_graph import Axis, along
from drophot.structured.operator_call import OperatorCall, OutputAxes, Rule


def named(rule: Rule, names: str) -> dict[str, Rule]:
    """One rule for several operators, whose names are separated by spaces."""
    return dict.fromkeys(names.split(), rule)


def _pad(call: OperatorCall, x: Tensor, pad: Sequence[int], *_: Any) -> OutputAxes:
    """Padding along channels keeps its width."""
    graph = call.graph
    sides = {x.dim() - 1 - i: pad[2 * i : 2 * i + 2] for i in range(len(pad) // 2)}
    padded = [dim for dim, (a, b) in sides.items() if a or b]
    found = []
    for axis in graph.axes_of(x):
        axis = graph.uniform(axis, [dim for dim in padded if dim != axis.dim])
        if axis.dim in padded:
            if min(sides[axis.dim]) < 0:
                return None
            shape = list(axis.ids.shape)
            shape[axis.dim] = -1
            before, after = (
                graph.new_entries(x.dim(), axis.dim, n).expand(shape) for n in sides[axis.dim]
            )
            graph.freeze([Axis(axis.dim, before), Axis(axis.dim, after)], call.reason)
            ids = torch.cat([before, axis.ids, after], axis.dim)
            axis = Axis(axis.dim, ids)
        found.append(axis)
    return [found]


def _cat(call: OperatorCall, tensors: Sequence[Tensor], dim: int = 0) -> OutputAxes:
    graph, (out,) = call.graph, call.outputs
    tensors = [t for t in tensors if t.shape != (0,)]
    dim %= out.dim()
    rest = [(*t.shape[:dim], 1, *t.shape[dim + 1 :]) for t in tensors]
    others = [[a for a in graph.axes_of(t) if a.dim != dim] for t in tensors]
    others = [[graph.uniform(a, [dim]) for a in axes] for axes in others]
    shape = list(out.shape)
    shape[dim] = 1
    found = graph.broadcast(shape, list(zip(rest, others, strict=True)), call.reason)
    joined = [next((a for a in graph.axes_of(t) if a.dim == dim), None) for t in tensors]
    if any(joined):
        pieces = []
        for tensor, axis in zip(tensors, joined, strict=True):
            if axis is None:
                axis = Axis(dim, graph.new_entries(tensor.dim(), dim, tensor.shape[dim]))
                graph.freeze([axis], call.reason)
            pieces.append(axis.ids)
        sizes = [max(p.size(d) for p in pieces) for d in range(out.dim())]
        pieces = [
            p.expand([p.size(d) if d == dim else s for d, s in enumerate(sizes)]) for p in pieces
        ]
        found.append(Axis(dim, torch.cat(pieces, dim)))
    return [found]


def _stack(call: OperatorCall, tensors: Sequence[Tensor], dim: int = 0) -> OutputAxes:
    (out,) = call.outputs
    dim %= out.dim()
    shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) for t in tensors]
    axes = [[_unsqueezed(a, dim) for a in call.graph.axes_of(t)] for t in tensors]
    shape = list(out.shape)
    shape[dim] = 1
    return [call.graph.broadcast(shape, list(zip(shapes, axes, strict=True)), call.reason)]


def _split(call: OperatorCall, x: Tensor, size: Any, dim: int = 0) -> list[list[Axis]]:
    dim %= x.dim()
    sizes = [out.shape[dim] for out in call.outputs]
    found: list[list[Axis]] = [[] for _ in sizes]
    for axis in call.graph.axes_of(x):
        if axis.dim == dim:
            rows = axis.rows()
            if len(set(sizes)) == 1 and sizes[0]:
                call.graph.balanced.append(rows.reshape(-1, sizes[0]))
            else:
                call.graph.balanced += rows.split(sizes, 1)
        start = 0
        for out, length in zip(found, sizes, strict=True):
            ids = axis.ids
            out.append(
                Axis(axis.dim, ids if ids.size(dim) == 1 else ids.narrow(dim, start, length))
            )
            start += length
    return found


def _slice(
    call: OperatorCall,
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> OutputAxes:
    graph, (out,) = call.graph, call.outputs
    dim %= x.dim()
    if out.shape == x.shape:
        return [graph.axes_of(x)]
    part = slice(start, end, step)
    first, length, size = part.indices(x.shape[dim])[0], out.shape[dim], x.shape[dim]
    found = []
    for axis in graph.axes_of(x):
        ids = axis.ids
        if axis.dim == dim:
            rows = axis.rows()
            if not length:
                continue
            if step > 1 and size % step == 0:  # `step` neighbors are removed together
                neighbors = rows.reshape(-1, step)
                graph.couple(neighbors[:, :1], neighbors)
            elif step > 1:
                graph.freeze([axis], call.reason)
                continue
            elif length > 1 and size % length == first % length == 0:  # one of several equal parts
                graph.balanced.append(rows.reshape(-1, length))
            else:
                graph.balanced += rows.split([first, length, size - first - length], 1)
        if ids.size(dim) > 1:
            ids = ids.movedim(dim, 0)[part].movedim(0, dim)
        found.append(Axis(axis.dim, ids))
    return [found]


def _select(call: OperatorCall, x: Tensor, dim: int, index: int) -> list[list[Axis]]:
    dim %= x.dim()
    axes = call.graph.axes_of(x)
    call.graph.freeze([axis for axis in axes if axis.dim == dim], call.reason)
    return [
        [
            Axis(a.dim - (a.dim > dim), a.ids.select(dim, 0 if a.ids.size(dim) == 1 else index))
            for a in axes
            if a.dim != dim
        ]
    ]


def _unbind(call: OperatorCall, x: Tensor, dim: int = 0) -> OutputAxes:
    return [_select(call, x, dim, i)[0] for i in range(len(call.outputs))]


def _permute(call: OperatorCall, x: Tensor, dims: Sequence[int]) -> OutputAxes:
    order = [dim % x.dim() for dim in dims]
    return [[Axis(order.index(a.dim), a.ids.permute(order)) for a in call.graph.axes_of(x)]]


def _transpose(call: OperatorCall, x: Tensor, a: int = 0, b: int = 1) -> OutputAxes:
    order = list(range(x.dim()))
    if order:
        a, b = a % x.dim(), b % x.dim()
    if len(order) > 1:
        order[a], order[b] = order[b], order[a]
    return _permute(call, x, order)


def _unsqueeze(call: OperatorCall, x: Tensor, dim: int) -> OutputAxes:
    return [[_unsqueezed(a, dim % (x.dim() + 1)) for a in call.graph.axes_of(x)]]


def _unsqueezed(axis: Axis, dim: int) -> Axis:
    return Axis(axis.dim + (axis.dim >= dim), axis.ids.unsqueeze(dim))


def _view(call: OperatorCall, x: Tensor, *_: Any, **__: Any) -> OutputAxes:
    if prod(x.shape) == 0:
        return None
    axes = call.graph.axes_of(x)
    found = [call.graph.reshape(axis, x.shape, call.outputs[0].shape) for axis in axes]
    largest: dict[int, Axis] = {}
    for old, axis in sorted(zip(axes, found, strict=True), key=lambda p: -p[0].ids.numel()):
        if axis is not None and largest.setdefault(axis.dim, axis) is not axis:
            # Two dimensions became one, such as a weight's inputs and its kernel.
            call.graph.freeze([old], call.reason)
    return [list(largest.values())]


def _expand(call: OperatorCall, x: Tensor, *_: Any, **__: Any) -> OutputAxes:
    shape = call.outputs[0].shape
    more = len(shape) - x.dim()
    found = [Axis(a.dim + more, a.ids[(None,) * more]) for a in call.graph.axes_of(x)]
    for dim, size in enumerate(shape):  # as wide as the tensor it is combined with
        if size > 1 and (dim < more or x.size(dim - more) == 1):
            found.append(Axis(dim, call.graph.new_entries(len(shape), dim, size)))
    return [found]


def _fill(call: OperatorCall, *_: Any, **__: Any) -> OutputAxes:
    """One value everywhere, as wide as the tensor it is combined with."""
    shape = call.outputs[0].shape
    new = call.graph.new_entries
    return [[Axis(d, new(len(shape), d, n)) for d, n in enumerate(shape) if n > 1]]


def _repeat(call: OperatorCall, x: Tensor, times: Any) -> OutputAxes:
    graph, more = call.graph, len(times) - x.dim()
    axes = graph.axes_of(x)
    found, own = [], {axis.dim + more for axis in axes}
    for axis in axes:
        ids = axis.ids[(None,) * more]
        dims = [n if ids.size(d) > 1 or d == axis.dim + more else 1 for d, n in enumerate(times)]
        found.append(Axis(axis.dim + more, ids.repeat(dims)))
    for dim, number in enumerate(times):  # as many times as another tensor is wide
        if number > 1 and dim not in own:
            row = graph.new_entries(1, 0, number)
            row = row.repeat_interleave(call.outputs[0].size(dim) // number)
            found.append(Axis(dim, along(row, len(times), dim)))
    return [found]


# These rules make new axes, so they are called even if no input has any.
MAKES_AXES = frozenset([_expand, _fill, _repeat])


def _glu(call: OperatorCall, x: Tensor, dim: int = -1) -> OutputAxes:
    dim %= x.dim()
    a, b = _split(replace(call, outputs=x.chunk(2, dim)), x, x.shape[dim] // 2, dim)
    shape = call.outputs[0].shape
    return [call.graph.broadcast(shape, [(shape, a), (shape, b)], call.reason)]


def _channel_shuffle(call: OperatorCall, x: Tensor, groups: int) -> OutputAxes:
    graph, others = call.graph, [d for d in range(x.dim()) if d != 1]
    axes = graph.axes_of(x)
    graph.freeze([axis for axis in axes if axis.dim in others], call.reason)
    shuffled = []
    for axis in [graph.uniform(axis, others) for axis in axes if axis.dim not in others]:
        rows = axis.ids.reshape(groups, -1)
        graph.couple(rows[:1], rows)  # otherwise the order of the rest would change
        shuffled.append(Axis(1, rows.t().reshape(axis.ids.shape)))
    return [shuffled]


def _restride(call: OperatorCall, x: Tensor, *_: Any) -> OutputAxes:
    """In place with the same shape, as pooling does for a memory format."""
    axes = call.graph.axes_of(x)
    if any(
        axis.ids.dim() != x.dim() or axis.ids.size(axis.dim) != x.size(axis.dim) for axis in axes
    ):
        return None
    return [axes]


RESHAPES: dict[str, Rule] = {
    **named(_pad, "constant_pad_nd"),
    **named(_cat, "cat"),
    **named(_stack, "stack"),
    **named(_split, "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes"),
    **named(_slice, "slice"),
    **named(_select, "select"),
    **named(_unbind, "unbind"),
    **named(_permute, "permute"),
    **named(_transpose, "transpose t"),
    **named(_unsqueeze, "unsqueeze"),
    **named(_view, "view _unsafe_view reshape squeeze _reshape_alias"),
    **named(_expand, "expand"),
    **named(_fill, "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor"),
    **named(_repeat, "repeat"),
    **named(_glu, "glu"),
    **named(_channel_shuffle, "channel_shuffle native_channel_shuffle"),
    "as_strided_": _restride,
}
