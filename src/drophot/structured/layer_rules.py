"""Rules of elementwise operators, matrix products, norms and embeddings, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drophot.structured.convolution_rules import CONVOLUTIONS
from drophot.structured.dependency_graph import Axis, along
from drophot.structured.operator_call import OperatorCall, OutputAxes, Rule
from drophot.structured.reduction_rules import REDUCTIONS
from drophot.structured.reshape_rules import RESHAPES, named


def elementwise(call: OperatorCall, *args: Any, **_: Any) -> OutputAxes:
    """Entries at the same index of tensors that broadcast are removed together."""
    tensors = [(t.shape, call.graph.axes_of(t)) for t in args if isinstance(t, Tensor) and t.dim()]
    return [call.graph.broadcast(call.outputs[0].shape, tensors, call.reason)]


def _same(call: OperatorCall, x: Tensor, *_: Any, **__: Any) -> OutputAxes:
    return [call.graph.axes_of(x)]


def _same_for_all(call: OperatorCall, x: Tensor, *_: Any, **__: Any) -> OutputAxes:
    return [call.graph.axes_of(x) for _ in call.outputs]


def _no_axes(call: OperatorCall, *_: Any, **__: Any) -> OutputAxes:
    return [[] for _ in call.outputs]


def _matmul(call: OperatorCall, a: Tensor, b: Tensor) -> OutputAxes:
    graph = call.graph
    return [graph.matmul(a, b, graph.axes_of(a), graph.axes_of(b), call.reason)]


def _addmm(call: OperatorCall, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> OutputAxes:
    graph, shape = call.graph, call.outputs[0].shape
    found = graph.matmul(a, b, graph.axes_of(a), graph.axes_of(b), call.reason)
    return [
        graph.broadcast(shape, [(bias.shape, graph.axes_of(bias)), (shape, found)], call.reason)
    ]


def _distance(call: OperatorCall, a: Tensor, b: Tensor, *_: Any) -> OutputAxes:
    """Distances of each row to each row sum over the channels, as a matrix product does."""
    graph, last, its = call.graph, a.dim() - 1, b.dim() - 1
    if not last:
        return None
    transposed = {its: its - 1, its - 1: its}
    axes = [
        Axis(transposed.get(x.dim, x.dim), x.ids.transpose(its - 1, its)) for x in graph.axes_of(b)
    ]
    return [graph.matmul(a, b.transpose(its - 1, its), graph.axes_of(a), axes, call.reason)]


def _batch_norm(call: OperatorCall, x: Tensor, *args: Any, **_: Any) -> OutputAxes:
    graph = call.graph
    for axis in graph.axes_of(x):
        graph.request_dim(axis, 1)
    tensors: list[tuple[Sequence[int], list[Axis]]] = [(x.shape, graph.axes_of(x))]
    for tensor in args[:4]:
        if tensor is not None:
            own = [1] * x.dim()
            own[1] = len(tensor)
            axes = [Axis(1, along(a.ids.reshape(-1), x.dim(), 1)) for a in graph.axes_of(tensor)]
            tensors.append((own, axes))
    found = graph.broadcast(x.shape, tensors, call.reason)
    means = [Axis(0, graph.uniform(a, range(x.dim())).ids.reshape(-1)) for a in found if a.dim == 1]
    return [found, *[means if len(out) == x.shape[1] else [] for out in call.outputs[1:]]]


def _layer_norm(
    call: OperatorCall, x: Tensor, shape: Any, weight: Tensor | None, bias: Any = None, *_: Any
) -> OutputAxes:
    graph = call.graph
    tensors = [(t.shape, graph.axes_of(t)) for t in (x, weight, bias) if isinstance(t, Tensor)]
    found = graph.broadcast(x.shape, tensors, call.reason)
    first = x.dim() - len(shape)
    rest = [graph.uniform(axis, range(first, x.dim())) for axis in found if axis.dim < first]
    return [found, *[rest if out.dim() == x.dim() else [] for out in call.outputs[1:]]]


def _group_norm(
    call: OperatorCall,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    hw: int,
    groups: int,
    *_: Any,
) -> OutputAxes:
    """It loses equally many channels in each group, or whole groups, as a grouped convolution."""
    graph = call.graph
    found = (_batch_norm(call, x, weight, bias) or [[]])[0]
    own = next((axis for axis in found if axis.dim == 1), None)
    if own is None:
        return [found, *[[] for _ in call.outputs[1:]]]
    rows = graph.uniform(own, range(x.dim())).ids.reshape(groups, -1)
    if c // groups >= groups:
        graph.balanced.append(rows)
        return [found, *[[] for _ in call.outputs[1:]]]
    graph.couple(rows[:, :1], rows)
    if weight is not None and (name := graph.names.get(weight)) is not None:
        graph.group_entries[name] = rows[:, 0]
    return [found, *[[Axis(1, rows[:, :1].t())] for _ in call.outputs[1:]]]


def _embedding(call: OperatorCall, weight: Tensor, index: Tensor, *_: Any, **__: Any) -> OutputAxes:
    graph = call.graph
    graph.freeze([axis for axis in graph.axes_of(weight) if axis.dim == 0], call.reason)
    dims = call.outputs[0].dim()
    return [
        [
            Axis(dims - 1, along(axis.ids.reshape(-1), dims, dims - 1))
            for axis in graph.axes_of(weight)
            if axis.dim
        ]
    ]


RULES: dict[str, Rule] = {
    **RESHAPES,
    **REDUCTIONS,
    **CONVOLUTIONS,
    **named(
        _same, "clone alias detach contiguous _to_copy lift_fresh dropout zero_ fill_ bernoulli"
    ),
    **named(_same, "zeros_like ones_like empty_like full_like rand_like randn_like"),
    **named(_same_for_all, "native_dropout"),
    **named(_no_axes, "sym_size sym_numel size"),
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
