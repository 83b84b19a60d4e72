"""What operators tie that move entries, add them up or put them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from drophot._ties import Axis, Ties

_MASKS = (torch.bool, torch.uint8)

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
            axis = ties.even(axis, range(x.dim()))
            if len(set(sizes)) == 1:
                ties.level.append(axis.ids.reshape(len(sizes), -1))
            else:
                ties.parts += axis.ids.reshape(-1).split(sizes)
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
            ids = ties.even(axis, range(x.dim())).ids
            row = ids.reshape(-1)
            if step > 1 and size % step == 0:  # of neighbours each, which go together
                ties.tie(row.reshape(-1, step)[:, :1], row.reshape(-1, step))
            elif step > 1 or not length:
                ties.fix([axis], where)
                continue
            elif size % length == first % length == 0:  # one of several equal parts
                ties.level.append(row.reshape(-1, length))
            else:
                ties.parts += [row[:first], row[first : first + length], row[first + length :]]
        if ids.size(dim) > 1:
            ids = ids.movedim(dim, 0)[part].movedim(0, dim)
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


_expand.makes_axes = _made.makes_axes = True  # pyright: ignore[reportFunctionMemberAccess]


def _repeat(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, times: Any) -> Found:
    more = len(times) - x.dim()
    found = []
    for axis in ties.of(x):
        ids = axis.ids[(None,) * more]
        dims = [n if ids.size(d) > 1 or d == axis.dim + more else 1 for d, n in enumerate(times)]
        found.append(Axis(axis.dim + more, ids.repeat(dims)))
    return [found]


def _glu(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int = -1) -> Found:
    dim %= x.dim()
    a, b = _split(ties, where, x.chunk(2, dim), x, x.shape[dim] // 2, dim)
    return [ties.merge(outs[0].shape, [(outs[0].shape, a), (outs[0].shape, b)], where)]


def _pixel_shuffle(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, by: int) -> Found:
    """As many neighbours as there are pixels make a channel."""
    found = _keep_off(ties, where, x, [d for d in range(x.dim()) if d != x.dim() - 3])
    for axis in found:
        rows = axis.ids.reshape(-1, by * by)
        ties.tie(rows[:, :1], rows)
    return [
        [
            Axis(
                a.dim,
                a.ids
                .narrow(a.dim, 0, a.ids.size(a.dim))
                .movedim(a.dim, -1)[..., :: by * by]
                .movedim(-1, a.dim),
            )
            for a in found
        ]
    ]


def _channel_shuffle(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, groups: int
) -> Found:
    found = _keep_off(ties, where, x, [d for d in range(x.dim()) if d != 1])
    shuffled = []
    for axis in found:
        rows = axis.ids.reshape(groups, -1)
        ties.level.append(rows)
        shuffled.append(Axis(1, rows.t().reshape(axis.ids.shape)))
    return [shuffled]


def _im2col(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, kernel: Any, *_: Any):
    places = prod(kernel) if not isinstance(kernel, int) else kernel**2
    found = _keep_off(ties, where, x, [d for d in range(x.dim()) if d != x.dim() - 3])
    dim = outs[0].dim() - 2
    ids = [a.ids.reshape(-1).repeat_interleave(places) for a in found]
    return [[Axis(dim, row.reshape([1] * dim + [-1, 1])) for row in ids]]


def _along(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int = 0, *args: Any, **__: Any
) -> Found:
    """Work along one dimension, the same for all entries of the others."""
    dim %= x.dim()
    found = _keep_off(ties, where, x, [dim])
    for other in args:
        if isinstance(other, Tensor) and other.dim() == x.dim():
            axes = _keep_off(ties, where, other, [dim])
            shapes = [[1 if d == dim else n for d, n in enumerate(t.shape)] for t in (x, other)]
            shape = [1 if d == dim else n for d, n in enumerate(outs[0].shape)]
            found = ties.merge(shape, list(zip(shapes, (found, axes), strict=True)), where)
    return [found for _ in outs]


def _index(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, indices: Any) -> Found:
    """A choice along some neighbouring dimensions."""
    taken: list[int] = []
    place = 0
    for index in indices:
        span = index.dim() if index is not None and index.dtype in _MASKS else 1
        if index is not None:
            taken += range(place, place + span)
        place += span
    if not taken or taken != list(range(taken[0], taken[-1] + 1)):
        return None
    found = _keep_off(ties, where, x, taken)
    more = outs[0].dim() - x.dim()
    moved = []
    for axis in found:
        ids = axis.ids
        ids = ids.flatten(taken[0], taken[-1]) if len(taken) > 1 else ids
        ids = ids.reshape(
            *ids.shape[: taken[0]], *[1] * (more + len(taken)), *ids.shape[taken[0] + 1 :]
        )
        moved.append(Axis(axis.dim + (more if axis.dim > taken[0] else 0), ids))
    return [moved]


def _sampled(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any):
    """Images at other places: what is taken of all channels alike."""
    found = _keep_off(ties, where, x, [d for d in range(x.dim()) if d != 1])
    dims = outs[0].dim()
    return [[Axis(1, a.ids.reshape([-1 if d == 1 else 1 for d in range(dims)])) for a in found]]


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
    **named(_spatial, "upsample_nearest1d upsample_linear1d upsample_nearest3d"),
    **named(_spatial, "upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa"),
    **named(_spatial, "_upsample_bicubic2d_aa adaptive_max_pool3d avg_pool1d"),
    **named(_spatial, "reflection_pad2d replication_pad2d reflection_pad1d replication_pad1d"),
    **named(_pad, "constant_pad_nd"),
    **named(_roll, "roll"),
    **named(_flip, "flip"),
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
    **named(_pixel_shuffle, "pixel_shuffle"),
    **named(_channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **named(_im2col, "im2col"),
    **named(_along, "cumsum index_select index_add index_copy index_fill scatter_add gather"),
    **named(_index, "index"),
    **named(_sampled, "grid_sampler_2d grid_sampler_3d roi_align roi_pool"),
    "as_strided_": _strides,
}

# What is done over the channels that are kept where channels are gone, not over zeros.
OVER = frozenset([
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "linalg_vector_norm",
    "norm",
    "native_layer_norm",
    "_fused_rms_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
])
