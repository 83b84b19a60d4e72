"""What operators tie that move entries or put them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from drophot.structured.dependency_graph import Axis, Ties, along

# The axes of each output, or `None` where an operator is called in a way that is not known.
Found = list[list[Axis]] | None
Rule = Callable[..., Found]


def named(rule: Rule, names: str) -> dict[str, Rule]:
    """One rule for several operators.

    Args:
        rule: The rule.
        names: The operators', between spaces.

    Returns:
        The rule, by name.
    """
    return dict.fromkeys(names.split(), rule)


def _pad(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, pad: Sequence[int], *_: Any
) -> Found:
    """Beside channels stand as many constants as before."""
    sides = {x.dim() - 1 - i: pad[2 * i : 2 * i + 2] for i in range(len(pad) // 2)}
    padded = [dim for dim, (a, b) in sides.items() if a or b]
    found = []
    for axis in ties.of(x):
        axis = ties.even(axis, [dim for dim in padded if dim != axis.dim])
        if axis.dim in padded:
            if min(sides[axis.dim]) < 0:
                return None
            shape = list(axis.ids.shape)
            shape[axis.dim] = -1
            before, after = (ties.new(x.dim(), axis.dim, n).expand(shape) for n in sides[axis.dim])
            ties.fix([Axis(axis.dim, before), Axis(axis.dim, after)], where)
            ids = torch.cat([before, axis.ids, after], axis.dim)
            axis = Axis(axis.dim, ids)
        found.append(axis)
    return [found]


def _keep_off(ties: Ties, where: str, x: Tensor, dims: Sequence[int]) -> list[Axis]:
    """The axes along which nothing is mixed; the others stay."""
    ties.fix([axis for axis in ties.of(x) if axis.dim in dims], where)
    return [ties.even(axis, dims) for axis in ties.of(x) if axis.dim not in dims]


def _cat(ties: Ties, where: str, outs: Sequence[Tensor], tensors: Sequence[Tensor], dim: int = 0):
    tensors = [t for t in tensors if t.shape != (0,)]
    dim %= outs[0].dim()
    rest = [(*t.shape[:dim], 1, *t.shape[dim + 1 :]) for t in tensors]
    others = [[a for a in ties.of(t) if a.dim != dim] for t in tensors]
    others = [[ties.even(a, [dim]) for a in axes] for axes in others]
    shape = list(outs[0].shape)
    shape[dim] = 1
    found = ties.merge(shape, list(zip(rest, others, strict=True)), where)
    beside = [next((a for a in ties.of(t) if a.dim == dim), None) for t in tensors]
    if any(beside):
        pieces = []
        for tensor, axis in zip(tensors, beside, strict=True):
            if axis is None:
                axis = Axis(dim, ties.new(tensor.dim(), dim, tensor.shape[dim]))
                ties.fix([axis], where)
            pieces.append(axis.ids)
        sizes = [max(p.size(d) for p in pieces) for d in range(outs[0].dim())]
        pieces = [
            p.expand([p.size(d) if d == dim else s for d, s in enumerate(sizes)]) for p in pieces
        ]
        found.append(Axis(dim, torch.cat(pieces, dim)))
    return [found]


def _stack(ties: Ties, where: str, outs: Sequence[Tensor], tensors: Sequence[Tensor], dim: int = 0):
    dim %= outs[0].dim()
    shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) for t in tensors]
    axes = [[_unsqueezed(a, dim) for a in ties.of(t)] for t in tensors]
    shape = list(outs[0].shape)
    shape[dim] = 1
    return [ties.merge(shape, list(zip(shapes, axes, strict=True)), where)]


def _split(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, size: Any, dim: int = 0):
    dim %= x.dim()
    sizes = [out.shape[dim] for out in outs]
    found: list[list[Axis]] = [[] for _ in outs]
    for axis in ties.of(x):
        if axis.dim == dim:
            rows = _rows(axis)
            if len(set(sizes)) == 1:
                ties.level.append(rows.reshape(-1, sizes[0]))
            else:
                ties.level += rows.split(sizes, 1)
        start = 0
        for out, length in zip(found, sizes, strict=True):
            ids = axis.ids
            out.append(
                Axis(axis.dim, ids if ids.size(dim) == 1 else ids.narrow(dim, start, length))
            )
            start += length
    return found


def _slice(
    ties: Ties,
    where: str,
    outs: Sequence[Tensor],
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Found:
    dim %= x.dim()
    if outs[0].shape == x.shape:
        return [ties.of(x)]
    part = slice(start, end, step)
    first, length, size = part.indices(x.shape[dim])[0], outs[0].shape[dim], x.shape[dim]
    found = []
    for axis in ties.of(x):
        ids = axis.ids
        if axis.dim == dim:
            rows = _rows(axis)
            if not length:
                continue
            if step > 1 and size % step == 0:  # of neighbours each, which go together
                pairs = rows.reshape(-1, step)
                ties.tie(pairs[:, :1], pairs)
            elif step > 1:
                ties.fix([axis], where)
                continue
            elif length > 1 and size % length == first % length == 0:  # one of several equal parts
                ties.level.append(rows.reshape(-1, length))
            else:
                ties.level += rows.split([first, length, size - first - length], 1)
        if ids.size(dim) > 1:
            ids = ids.movedim(dim, 0)[part].movedim(0, dim)
        found.append(Axis(axis.dim, ids))
    return [found]


def _rows(axis: Axis) -> Tensor:
    """The entries of each row along an axis."""
    return axis.ids.movedim(axis.dim, -1).reshape(-1, axis.ids.size(axis.dim))


def _select(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int, index: int
) -> Found:
    dim %= x.dim()
    ties.fix([axis for axis in ties.of(x) if axis.dim == dim], where)
    return [
        [
            Axis(a.dim - (a.dim > dim), a.ids.select(dim, 0 if a.ids.size(dim) == 1 else index))
            for a in ties.of(x)
            if a.dim != dim
        ]
    ]


def _unbind(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int = 0) -> Found:
    return [(_select(ties, where, [out], x, dim, i) or [[]])[0] for i, out in enumerate(outs)]


def _permute(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dims: Sequence[int]
) -> Found:
    order = [dim % x.dim() for dim in dims]
    return [[Axis(order.index(a.dim), a.ids.permute(order)) for a in ties.of(x)]]


def _transpose(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, a: int = 0, b: int = 1):
    order = list(range(x.dim()))
    if order:
        a, b = a % x.dim(), b % x.dim()
    if len(order) > 1:
        order[a], order[b] = order[b], order[a]
    return _permute(ties, where, outs, x, order)


def _unsqueeze(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int) -> Found:
    return [[_unsqueezed(a, dim % (x.dim() + 1)) for a in ties.of(x)]]


def _unsqueezed(axis: Axis, dim: int) -> Axis:
    return Axis(axis.dim + (axis.dim >= dim), axis.ids.unsqueeze(dim))


def _view(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Found:
    if prod(x.shape) == 0:
        return None
    found = [ties.view(axis, x.shape, outs[0].shape) for axis in ties.of(x)]
    kept: dict[int, Axis] = {}
    for old, axis in sorted(zip(ties.of(x), found, strict=True), key=lambda p: -p[0].ids.numel()):
        if axis is not None and kept.setdefault(axis.dim, axis) is not axis:
            ties.fix([old], where)  # two that became one: the kernel's, of a weight
    return [list(kept.values())]


def _expand(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Found:
    shape = outs[0].shape
    more = len(shape) - x.dim()
    found = [Axis(a.dim + more, a.ids[(None,) * more]) for a in ties.of(x)]
    for dim, size in enumerate(shape):  # as wide as what it meets, which may shrink
        if size > 1 and (dim < more or x.size(dim - more) == 1):
            found.append(Axis(dim, ties.new(len(shape), dim, size)))
    return [found]


def _made(ties: Ties, where: str, outs: Sequence[Tensor], *args: Any, **__: Any) -> Found:
    """One value everywhere, in a shape that may shrink with what it meets."""
    shape = outs[0].shape
    return [[Axis(d, ties.new(len(shape), d, n)) for d, n in enumerate(shape) if n > 1]]


def _repeat(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, times: Any) -> Found:
    more = len(times) - x.dim()
    found, own = [], {axis.dim + more for axis in ties.of(x)}
    for axis in ties.of(x):
        ids = axis.ids[(None,) * more]
        dims = [n if ids.size(d) > 1 or d == axis.dim + more else 1 for d, n in enumerate(times)]
        found.append(Axis(axis.dim + more, ids.repeat(dims)))
    for dim, number in enumerate(times):  # as often as something is wide, which may shrink
        if number > 1 and dim not in own:
            row = ties.new(1, 0, number).repeat_interleave(outs[0].size(dim) // number)
            found.append(Axis(dim, along(row, len(times), dim)))
    return [found]


for _rule in (_expand, _made, _repeat):
    _rule.makes_axes = True  # pyright: ignore[reportFunctionMemberAccess]


def _glu(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int = -1) -> Found:
    dim %= x.dim()
    a, b = _split(ties, where, x.chunk(2, dim), x, x.shape[dim] // 2, dim)
    return [ties.merge(outs[0].shape, [(outs[0].shape, a), (outs[0].shape, b)], where)]


def _channel_shuffle(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, groups: int
) -> Found:
    found = _keep_off(ties, where, x, [d for d in range(x.dim()) if d != 1])
    shuffled = []
    for axis in found:
        rows = axis.ids.reshape(groups, -1)
        ties.tie(rows[:1], rows)  # or else their order would change
        shuffled.append(Axis(1, rows.t().reshape(axis.ids.shape)))
    return [shuffled]


def _strides(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any) -> Found:
    """In place and of the same shape, as pooling does it for a memory format."""
    if any(
        axis.ids.dim() != x.dim() or axis.ids.size(axis.dim) != x.size(axis.dim)
        for axis in ties.of(x)
    ):
        return None
    return [ties.of(x)]


MOVES: dict[str, Rule] = {
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
    **named(_made, "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor"),
    **named(_repeat, "repeat"),
    **named(_glu, "glu"),
    **named(_channel_shuffle, "channel_shuffle native_channel_shuffle"),
    "as_strided_": _strides,
}
