"""What operators tie that add up, compare or normalise over whole dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drophot.structured.dependency_graph import Axis, Ties
from drophot.structured.reshape_rules import Found, Rule, named


def _reduce(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, *args: Any, **kw: Any
) -> Found:
    """Sums and the like over some dimensions: what is left of those is added up."""
    given = kw["dim"] if "dim" in kw else args[0] if args else None
    if isinstance(given, Tensor):  # the larger of two tensors
        return None
    dims = _dims(None if given == [] else given, x.dim())
    found, over = [], []
    for axis in ties.of(x):
        if axis.dim in dims:
            over.append(axis)
            continue
        axis = ties.even(axis, dims)
        if outs[0].dim() < x.dim():
            kept = [d for d in range(x.dim()) if d not in dims]
            sizes = [axis.ids.size(d) for d in kept]
            axis = Axis(kept.index(axis.dim), axis.ids.reshape(sizes))
        found.append(axis)
    for out in outs:  # places among channels are others when some of these are gone
        if over and not out.is_floating_point():
            ties.places[out] = over, where
    return [found for _ in outs]


def _norm(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, order: Any, *args: Any, **kw: Any
) -> Found:
    return _reduce(ties, where, outs, x, *args, **kw)


def _softmax(
    ties: Ties, where: str, outs: Sequence[Tensor], x: Tensor, dim: int, *_: Any, **__: Any
) -> Found:
    return [[axis if axis.dim == dim % x.dim() else ties.even(axis, [dim]) for axis in ties.of(x)]]


def _dims(dims: Any, count: int) -> list[int]:
    if dims is None:
        return list(range(count))
    return [dim % count for dim in ([dims] if isinstance(dims, int) else dims)]


SUMS: dict[str, Rule] = {
    **named(_reduce, "mean sum nansum amax amin max min aminmax logsumexp"),
    **named(_reduce, "var std var_mean std_mean"),
    **named(_norm, "linalg_vector_norm norm"),
    **named(_softmax, "_softmax _log_softmax _safe_softmax"),
}

# What is done over the channels that are kept where channels are gone, not over zeros.
OVER = frozenset([
    *SUMS,
    "native_layer_norm",
    "_fused_rms_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
])
