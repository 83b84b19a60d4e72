"""Rules of operators that sum, compare or normalize over whole dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drophot.structured.dependency_graph import Axis
from drophot.structured.operator_call import OperatorCall, OutputAxes, Rule
from drophot.structured.reshape_rules import named


def _reduce(call: OperatorCall, x: Tensor, *args: Any, **kwargs: Any) -> OutputAxes:
    """Sums and other reductions over some dimensions, whose entries can be removed."""
    graph = call.graph
    given = kwargs["dim"] if "dim" in kwargs else args[0] if args else None
    if isinstance(given, Tensor):  # the elementwise maximum of two tensors
        return None
    dims = _dims(None if given == [] else given, x.dim())
    found, over = [], []
    for axis in graph.axes_of(x):
        if axis.dim in dims:
            over.append(axis)
            continue
        axis = graph.uniform(axis, dims)
        if call.outputs[0].dim() < x.dim():
            rest = [d for d in range(x.dim()) if d not in dims]
            sizes = [axis.ids.size(d) for d in rest]
            axis = Axis(rest.index(axis.dim), axis.ids.reshape(sizes))
        found.append(axis)
    for out in call.outputs:  # indices of entries change if some entries are removed
        if over and not out.is_floating_point():
            graph.indices[out] = over, call.reason
    return [found for _ in call.outputs]


def _norm(call: OperatorCall, x: Tensor, order: Any, *args: Any, **kwargs: Any) -> OutputAxes:
    return _reduce(call, x, *args, **kwargs)


def _softmax(call: OperatorCall, x: Tensor, dim: int, *_: Any, **__: Any) -> OutputAxes:
    return [
        [
            axis if axis.dim == dim % x.dim() else call.graph.uniform(axis, [dim])
            for axis in call.graph.axes_of(x)
        ]
    ]


def _dims(dims: Any, count: int) -> list[int]:
    if dims is None:
        return list(range(count))
    return [dim % count for dim in ([dims] if isinstance(dims, int) else dims)]


REDUCTIONS: dict[str, Rule] = {
    **named(_reduce, "mean sum nansum amax amin max min aminmax logsumexp"),
    **named(_reduce, "var std var_mean std_mean"),
    **named(_norm, "linalg_vector_norm norm"),
    **named(_softmax, "_softmax _log_softmax _safe_softmax"),
}

# Operators that are defined over the remaining channels, so that zeros would change their result.
OVER_CHANNELS = frozenset([
    *REDUCTIONS,
    "native_layer_norm",
    "_fused_rms_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
])
