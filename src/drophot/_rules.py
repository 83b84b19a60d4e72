"""What each operator ties: from the axes of its inputs to those of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drophot._moves import MOVES, Found, Rule, named
from drophot._ties import Axis, Ties, along


def elementwise(ties: Ties, where: str, outs: Sequence[Tensor], *args: Any, **_: Any) -> Found:
    """Entries of equal place go together.

    Args:
        ties: What is known so far.
        where: The call, in words.
        outs: What it gave.
        *args: What it was called with.
        **_: Does not matter.

    Returns:
        The axes of its output.
    """
    tensors = [(t.shape, ties.of(t)) for t in args if isinstance(t, Tensor) and t.dim()]
    return [ties.merge(outs[0].shape, tensors, where)]


def _same(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Found:
    return [ties.of(x)]


def _twice(ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *_: Any, **__: Any) -> Found:
    return [ties.of(x) for _ in outs]


def _nothing(ties: Ties, where: str, outs: Sequence[Tensor], *_: Any, **__: Any) -> Found:
    return [[] for _ in outs]


def _convolution(
    ties: Ties,
    where: str,
    outs: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Found:
    known = weight in ties.axes
    axes = {axis.dim: axis for axis in ties.of(weight)}
    ties.fix([axis for dim, axis in axes.items() if dim > 1], f"the kernel of {where}")
    ties.fix([axis for axis in ties.of(x) if axis.dim != 1], where)
    given = next((a for a in ties.of(x) if a.dim == 1), None)
    given = ties.even(given, range(x.dim())) if given else None
    ins, out = (0, 1) if transposed else (1, 0)
    if groups == 1:
        _join(ties, axes.get(ins), given, where)
        produced = axes.get(out)
        produced = produced and ties.even(produced, range(weight.dim())).ids.reshape(-1)
    elif not transposed:
        produced = _grouped(ties, where, weight, axes, given, groups, known)
    elif weight.shape[0] == groups and weight.shape[1] == 1:  # depthwise
        _join(ties, axes.get(0), given, where)
        produced = axes[0].ids.reshape(-1) if 0 in axes and given else None
        if (name := ties.names.get(weight)) is not None and produced is not None:
            ties.groups[name] = produced
    else:
        return None
    own = ties.of(bias) if bias is not None else []
    if produced is None or (bias is not None and not own):
        ties.fix(own, where)
        if produced is not None:
            ties.fix([Axis(0, produced)], where)
        return [[]]
    if own:
        ties.tie(own[0].ids, produced)
    return [[Axis(1, along(produced, outs[0].dim(), 1))]]


def _grouped(
    ties: Ties,
    where: str,
    weight: Tensor,
    axes: dict[int, Axis],
    given: Axis | None,
    groups: int,
    known: bool,
) -> Tensor | None:
    """A convolution in groups loses whole groups, or as many channels of each: what is finer."""
    if 0 not in axes:
        ties.fix([axis for axis in (axes.get(1), given) if axis], where)
        return None
    produced = ties.even(axes[0], range(weight.dim())).ids.reshape(groups, -1)
    ins, out = weight.shape[1], produced.shape[1]
    if min(ins, out) < groups:
        name = ties.names.get(weight)
        if given is None:
            ties.fix([axes[0]], where)
        else:
            columns = given.ids.reshape(groups, -1)
            ties.tie(columns[:, :1], columns)
            ties.tie(columns[:, :1], produced)
            if name is not None:
                ties.groups[name] = columns[:, 0]
        ties.fix([axis for dim, axis in axes.items() if dim == 1], where)
        return produced.reshape(-1)
    ties.level.append(produced)
    if given is None or 1 not in axes:
        ties.fix([axis for axis in (axes.get(1), given) if axis], where)
    else:
        columns = given.ids.reshape(groups, -1)
        ties.level.append(columns)
        ids = columns.repeat_interleave(out, 0).reshape(
            *weight.shape[:2], *[1] * (weight.dim() - 2)
        )
        if known:
            ties.tie(axes[1].ids, ids)
        else:  # each group has columns of its own
            ties.axes[weight] = [a if a.dim != 1 else Axis(1, ids) for a in axes.values()]
    return produced.reshape(-1)


def _join(ties: Ties, mine: Axis | None, given: Axis | None, where: str) -> None:
    """The columns of a weight and the channels that it is given."""
    if mine and given:
        ties.tie(mine.ids.reshape(-1), given.ids.reshape(-1))
    else:
        ties.fix([axis for axis in (mine, given) if axis], where)


def _matmul(ties: Ties, where: str, outs: Sequence[Tensor], a: Tensor, b: Tensor) -> Found:
    return [ties.product(a, b, ties.of(a), ties.of(b), where)]


def _addmm(
    ties: Ties, where: str, outs: Sequence[Tensor], bias: Tensor, a: Tensor, b: Tensor, **_: Any
) -> Found:
    found = ties.product(a, b, ties.of(a), ties.of(b), where)
    shape = outs[0].shape
    return [ties.merge(shape, [(bias.shape, ties.of(bias)), (shape, found)], where)]


def _batch_norm(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *args: Any, **_: Any
) -> Found:
    tensors: list[tuple[Sequence[int], list[Axis]]] = [(x.shape, ties.of(x))]
    for tensor in args[:4]:
        if tensor is not None:
            own = [1] * x.dim()
            own[1] = len(tensor)
            axes = [Axis(1, along(a.ids.reshape(-1), x.dim(), 1)) for a in ties.of(tensor)]
            tensors.append((own, axes))
    found = ties.merge(x.shape, tensors, where)
    means = [Axis(0, ties.even(a, range(x.dim())).ids.reshape(-1)) for a in found if a.dim == 1]
    return [found, *[means if len(out) == x.shape[1] else [] for out in outs[1:]]]


def _layer_norm(
    ties: Ties,
    where: str,
    outs: Sequence[Tensor],
    x: Tensor,
    shape: Any,
    weight: Tensor | None,
    bias: Any = None,
    *_: Any,
) -> Found:
    tensors = [(t.shape, ties.of(t)) for t in (x, weight, bias) if isinstance(t, Tensor)]
    found = ties.merge(x.shape, tensors, where)
    first = x.dim() - len(shape)
    rest = [ties.even(axis, range(first, x.dim())) for axis in found if axis.dim < first]
    return [found, *[rest if out.dim() == x.dim() else [] for out in outs[1:]]]


def _group_norm(
    ties: Ties,
    where: str,
    outs: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    hw: int,
    groups: int,
    *_: Any,
) -> Found:
    found, *rest = _batch_norm(ties, where, outs, x, weight, bias) or []
    for axis in found:
        if axis.dim == 1:
            axis = ties.even(axis, range(x.dim()))
            if c == groups and weight is not None and weight in ties.names:
                ties.groups[ties.names[weight]] = axis.ids.reshape(-1)
                continue
            if c == groups:
                ties.fix([axis], where)
            ties.level.append(axis.ids.reshape(groups, -1))
    return [found, *rest]


def _embedding(
    ties: Ties,
    where: str,
    outs: Sequence[Tensor],
    weight: Tensor,
    index: Tensor,
    *_: Any,
    **__: Any,
) -> Found:
    ties.fix([axis for axis in ties.of(weight) if axis.dim == 0], where)
    dims = outs[0].dim()
    return [
        [Axis(dims - 1, along(a.ids.reshape(-1), dims, dims - 1)) for a in ties.of(weight) if a.dim]
    ]


RULES: dict[str, Rule] = {
    **MOVES,
    **named(
        _same, "clone alias detach contiguous _to_copy lift_fresh dropout zero_ fill_ bernoulli"
    ),
    **named(_same, "zeros_like ones_like empty_like full_like rand_like randn_like"),
    **named(_twice, "native_dropout"),
    **named(_nothing, "sym_size sym_numel size"),
    **named(elementwise, "hardswish hardsigmoid hardtanh leaky_relu elu gelu silu mish copy where"),
    **named(elementwise, "relu6 prelu masked_fill _prelu_kernel"),
    **named(_convolution, "convolution"),
    **named(_matmul, "mm bmm"),
    **named(_addmm, "addmm baddbmm"),
    **named(_batch_norm, "native_batch_norm cudnn_batch_norm miopen_batch_norm"),
    **named(_batch_norm, "_native_batch_norm_legit_no_training _native_batch_norm_legit"),
    **named(_batch_norm, "_batch_norm_with_update _batch_norm_no_update"),
    **named(_layer_norm, "native_layer_norm _fused_rms_norm"),
    **named(_group_norm, "native_group_norm"),
    **named(_embedding, "embedding"),
}
