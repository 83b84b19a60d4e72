"""Rules of convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drophot.structured.dependency_graph import Axis, along
from drophot.structured.operator_call import OperatorCall, OutputAxes, Rule
from drophot.structured.reasons import inside
from drophot.structured.reshape_rules import named


def _convolution(
    call: OperatorCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> OutputAxes:
    graph = call.graph
    known = weight in graph.axes
    axes = {axis.dim: axis for axis in graph.axes_of(weight)}
    graph.freeze(
        [axis for dim, axis in axes.items() if dim > 1],
        f"the size of the kernel in {inside(call.module)}",
    )
    given = graph.only_axis(x, 1, call.reason)
    given = graph.uniform(given, range(x.dim())) if given else None
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if groups == 1:
        _contract(call, axes.get(in_dim), given)
        produced = axes.get(out_dim)
        produced = produced and graph.uniform(produced, range(weight.dim())).ids.reshape(-1)
    else:
        produced = _grouped(call, weight, axes, given, groups, known, transposed)
    own = graph.axes_of(bias) if bias is not None else []
    if produced is None or (bias is not None and not own):
        graph.freeze(own, call.reason)
        if produced is not None:
            graph.freeze([Axis(0, produced)], call.reason)
        return [[]]
    if own:
        graph.couple(own[0].ids, produced)
    return [[Axis(1, along(produced, call.outputs[0].dim(), 1))]]


def _grouped(
    call: OperatorCall,
    weight: Tensor,
    axes: dict[int, Axis],
    given: Axis | None,
    groups: int,
    known: bool,
    transposed: bool,
) -> Tensor | None:
    """The outputs of a grouped convolution.

    It loses equally many channels in each group, or whole groups if it has more groups than
    channels per group.
    """
    # Dimension 0 of the weight has the channels of all groups, dimension 1 those of one group:
    # outputs and inputs, or inputs and outputs if the convolution is transposed.
    graph = call.graph
    if 0 not in axes or (given is None and transposed):
        graph.freeze([axis for axis in (*axes.values(), given) if axis], call.reason)
        return None
    whole = graph.uniform(axes[0], range(weight.dim())).ids.reshape(groups, -1)
    each = weight.shape[1]
    if transposed and given is not None:
        graph.couple(whole, given.ids.reshape(groups, -1))
        part = graph.new_entries(1, 0, groups * each).reshape(groups, each)
    else:
        part = given.ids.reshape(groups, -1) if given else None
    if min(each, whole.shape[1]) < groups:
        if part is None:
            graph.freeze([axes[0]], call.reason)
        else:
            graph.couple(whole[:, :1], part)
            graph.couple(whole[:, :1], whole)
            if (name := graph.parameter_name(weight, whole.reshape(-1))) is not None:
                graph.group_entries[name] = whole[:, 0]
        graph.freeze([axis for dim, axis in axes.items() if dim == 1], call.reason)
    else:
        graph.balanced.append(whole)
        if part is None or (1 not in axes and each > 1):
            graph.freeze([axis for axis in (axes.get(1), given) if axis], call.reason)
        else:
            graph.balanced.append(part)
            ids = part.repeat_interleave(whole.shape[1], 0)
            ids = ids.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
            if known and 1 in axes:
                graph.couple(axes[1].ids, ids)
            else:  # each group has different entries
                graph.axes[weight] = [a for a in axes.values() if a.dim != 1]
                graph.axes[weight] += [Axis(1, ids)] if each > 1 else []
    if transposed:
        return None if part is None else part.reshape(-1)
    return whole.reshape(-1)


def _contract(call: OperatorCall, columns: Axis | None, channels: Axis | None) -> None:
    """Couple the columns of a weight and the channels that they are multiplied with."""
    if columns and channels:
        call.graph.couple(columns.ids.reshape(-1), channels.ids.reshape(-1))
    else:
        call.graph.freeze([axis for axis in (columns, channels) if axis], call.reason)


def _deformable(
    call: OperatorCall,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *sizes: Any,
) -> OutputAxes:
    """As a convolution; the offsets and the mask keep all of their channels."""
    *_, groups, offset_groups, _ = sizes
    call.graph.freeze(call.graph.axes_of(offset) + call.graph.axes_of(mask), call.reason)
    if offset_groups > 1:
        call.graph.freeze(call.graph.axes_of(x), call.reason)
    return _convolution(call, x, weight, bias, 1, 0, 1, False, 0, groups)


CONVOLUTIONS: dict[str, Rule] = {
    **named(_convolution, "convolution"),
    **named(_deformable, "deform_conv2d"),
}
