"""What each operator ties: from the axes of its inputs to those of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drophot.structured.convolution_rules import KERNELS
from drophot.structured.dependency_graph import Axis, Ties, along
from drophot.structured.reduction_rules import SUMS
from drophot.structured.reshape_rules import MOVES, Found, Rule, named


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


def _matmul(ties: Ties, where: str, outs: Sequence[Tensor], a: Tensor, b: Tensor) -> Found:
    return [ties.product(a, b, ties.of(a), ties.of(b), where)]


def _addmm(
    ties: Ties, where: str, outs: Sequence[Tensor], bias: Tensor, a: Tensor, b: Tensor, **_: Any
) -> Found:
    found = ties.product(a, b, ties.of(a), ties.of(b), where)
    shape = outs[0].shape
    return [ties.merge(shape, [(bias.shape, ties.of(bias)), (shape, found)], where)]


def _distance(
    ties: Ties, where: str, outs: Sequence[Tensor], a: Tensor, b: Tensor, *_: Any
) -> Found:
    """Of each row to each row: a sum over the channels, as a product's."""
    last, its = a.dim() - 1, b.dim() - 1
    turned = {its: its - 1, its - 1: its}
    axes = [Axis(turned.get(x.dim, x.dim), x.ids.transpose(its - 1, its)) for x in ties.of(b)]
    return [ties.product(a, b.transpose(its - 1, its), ties.of(a), axes, where)] if last else None


def _batch_norm(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *args: Any, **_: Any
) -> Found:
    for axis in ties.of(x):
        ties.turn(axis, 1)
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
    """Loses whole groups, which are what they were; or as many channels of each: what is finer."""
    found = (_batch_norm(ties, where, outs, x, weight, bias) or [[]])[0]
    own = next((axis for axis in found if axis.dim == 1), None)
    if own is None:
        return [found, *[[] for _ in outs[1:]]]
    rows = ties.even(own, range(x.dim())).ids.reshape(groups, -1)
    if c // groups >= groups:
        ties.level.append(rows)
        return [found, *[[] for _ in outs[1:]]]
    ties.tie(rows[:, :1], rows)
    if weight is not None and (name := ties.names.get(weight)) is not None:
        ties.groups[name] = rows[:, 0]
    return [found, *[[Axis(1, rows[:, :1].t())] for _ in outs[1:]]]


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
    **SUMS,
    **KERNELS,
    **named(
        _same, "clone alias detach contiguous _to_copy lift_fresh dropout zero_ fill_ bernoulli"
    ),
    **named(_same, "zeros_like ones_like empty_like full_like rand_like randn_like"),
    **named(_twice, "native_dropout"),
    **named(_nothing, "sym_size sym_numel size"),
    **named(elementwise, "hardswish hardsigmoid hardtanh leaky_relu elu gelu silu mish copy where"),
    **named(elementwise, "relu6 prelu masked_fill _prelu_kernel"),
    **named(_matmul, "mm bmm"),
    **named(_distance, "_cdist_forward _euclidean_dist"),
    **named(_addmm, "addmm baddbmm"),
    **named(_batch_norm, "native_batch_norm cudnn_batch_norm miopen_batch_norm"),
    **named(_batch_norm, "_native_batch_norm_legit_no_training _native_batch_norm_legit"),
    **named(_batch_norm, "_batch_norm_with_update _batch_norm_no_update"),
    **named(_layer_norm, "native_layer_norm _fused_rms_norm"),
    **named(_group_norm, "native_group_norm"),
    **named(_embedding, "embedding"),
}
