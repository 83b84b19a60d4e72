"""What operators tie that move entries, add them up or put them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from drophot._ties import Axis, Ties

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


def _reduce(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *args: Any, **kw: Any
) -> Found:
    """Sums and the like over some dimensions: what is left of those is added up."""
    given = kw["dim"] if "dim" in kw else args[0] if args else None
    dims = _dims(None if given == [] else given, x.dim())
    found = []
    for axis in ties.of(x):
        if axis.dim not in dims:
            axis = ties.even(axis, dims)
            if outs[0].dim() < x.dim():
                kept = [d for d in range(x.dim()) if d not in dims]
                sizes = [axis.ids.size(d) for d in kept]
                axis = Axis(kept.index(axis.dim), axis.ids.reshape(sizes))
            found.append(axis)
    return [found, *[[] for _ in outs[1:]]]


def _norm(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, order: Any, *args: Any, **kw: Any
):
    return _reduce(ties, where, outs, x, *args, **kw)


def _softmax(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int, *_: Any, **__: Any
):
    return [_keep_off(ties, where, x, [dim])]


def _spatial(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any
) -> Found:
    """Pooling, padding, resizing: images change, channels do not."""
    found = _keep_off(ties, where, x, range(2 if x.dim() > 3 else 1, x.dim()))
    return [found for _ in outs]  # the maxima and where they were


def _pad(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, pad: Sequence[int], *_: Any):
    padded = [x.dim() - 1 - i // 2 for i, size in enumerate(pad) if size]
    return [_keep_off(ties, where, x, padded)]


def _roll(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, shifts: Any, dims: Any = ()):
    return [_keep_off(ties, where, x, dims or None)]


def _flip(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dims: Any) -> Found:
    return [_keep_off(ties, where, x, dims)]


def _keep_off(ties: Ties, where: str, x: Tensor, dims: Any) -> list[Axis]:
    """The axes along which nothing is mixed; the others stay."""
    dims = _dims(dims, x.dim())
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
    along = [next((a for a in ties.of(t) if a.dim == dim), None) for t in tensors]
    if any(along):
        pieces = []
        for tensor, axis in zip(tensors, along, strict=True):
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
            if len(set(sizes)) > 1:
                ties.fix([axis], where)
                continue
            axis = ties.even(axis, range(x.dim()))
            ties.level.append(axis.ids.reshape(len(sizes), -1))
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
    first, length = part.indices(x.shape[dim])[0], outs[0].shape[dim]
    found = []
    for axis in ties.of(x):
        if (
            axis.dim == dim
            and step == 1
            and length
            and x.shape[dim] % length == first % length == 0
        ):
            axis = ties.even(axis, range(x.dim()))  # one of several equal parts
            ties.level.append(axis.ids.reshape(-1, length))
            found.append(Axis(dim, axis.ids.narrow(dim, first, length)))
        elif axis.dim == dim:
            ties.fix([axis], where)
        else:
            ids = (
                axis.ids
                if axis.ids.size(dim) == 1
                else axis.ids.movedim(dim, 0)[part].movedim(0, dim)
            )
            found.append(Axis(axis.dim, ids))
    return [found]


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
    return [[axis for axis in found if axis is not None]]


def _expand(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Found:
    shape = outs[0].shape
    more = len(shape) - x.dim()
    found = [Axis(a.dim + more, a.ids[(None,) * more]) for a in ties.of(x)]
    for dim in range(x.dim()):  # as wide as what it meets, which may shrink
        if x.size(dim) == 1 < shape[dim + more] and found:
            found.append(Axis(dim + more, ties.new(len(shape), dim + more, shape[dim + more])))
    return [found]


def _strides(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any) -> Found:
    """In place and of the same shape, as pooling does it for a memory format."""
    if any(
        axis.ids.dim() != x.dim() or axis.ids.size(axis.dim) != x.size(axis.dim)
        for axis in ties.of(x)
    ):
        return None
    return [ties.of(x)]


def _dims(dims: Any, count: int) -> list[int]:
    if dims is None:
        return list(range(count))
    return [dim % count for dim in ([dims] if isinstance(dims, int) else dims)]


MOVES: dict[str, Rule] = {
    **named(_reduce, "mean sum amax amin var std var_mean"),
    **named(_norm, "linalg_vector_norm norm"),
    **named(_softmax, "_softmax _log_softmax _safe_softmax"),
    **named(_spatial, "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d avg_pool3d"),
    **named(_spatial, "adaptive_max_pool2d max_pool3d_with_indices _adaptive_avg_pool3d"),
    **named(_spatial, "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"),
    **named(_spatial, "reflection_pad2d replication_pad2d"),
    **named(_pad, "constant_pad_nd"),
    **named(_roll, "roll"),
    **named(_flip, "flip"),
    **named(_cat, "cat"),
    **named(_stack, "stack"),
    **named(_split, "split split_with_sizes chunk"),
    **named(_slice, "slice"),
    **named(_select, "select"),
    **named(_unbind, "unbind"),
    **named(_permute, "permute"),
    **named(_transpose, "transpose t"),
    **named(_unsqueeze, "unsqueeze"),
    **named(_view, "view _unsafe_view reshape squeeze _reshape_alias"),
    **named(_expand, "expand"),
    "as_strided_": _strides,
}
