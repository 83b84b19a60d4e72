"""What convolutions tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drophot.structured.dependency_graph import Axis, Ties, along
from drophot.structured.reshape_rules import Found, Rule, named


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
    given = ties.at(x, 1, where)
    given = ties.even(given, range(x.dim())) if given else None
    ins, out = (0, 1) if transposed else (1, 0)
    if groups == 1:
        _join(ties, axes.get(ins), given, where)
        produced = axes.get(out)
        produced = produced and ties.even(produced, range(weight.dim())).ids.reshape(-1)
    else:
        produced = _grouped(ties, where, weight, axes, given, groups, known, transposed)
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
    transposed: bool,
) -> Tensor | None:
    """A convolution in groups loses whole groups, or as many channels of each: what is finer."""
    # The first dimension of its weight holds all groups, the second one what each of them has: the
    # outputs and the inputs, of a transposed convolution the other way round.
    if 0 not in axes or (given is None and transposed):
        ties.fix([axis for axis in (*axes.values(), given) if axis], where)
        return None
    whole = ties.even(axes[0], range(weight.dim())).ids.reshape(groups, -1)
    each = weight.shape[1]
    if transposed and given is not None:
        ties.tie(whole, given.ids.reshape(groups, -1))
        part = ties.new(1, 0, groups * each).reshape(groups, each)
    else:
        part = given.ids.reshape(groups, -1) if given else None
    if min(each, whole.shape[1]) < groups:
        if part is None:
            ties.fix([axes[0]], where)
        else:
            ties.tie(whole[:, :1], part)
            ties.tie(whole[:, :1], whole)
            if (name := ties.source(weight, whole.reshape(-1))) is not None:
                ties.groups[name] = whole[:, 0]
        ties.fix([axis for dim, axis in axes.items() if dim == 1], where)
    else:
        ties.level.append(whole)
        if part is None or (1 not in axes and each > 1):
            ties.fix([axis for axis in (axes.get(1), given) if axis], where)
        else:
            ties.level.append(part)
            ids = part.repeat_interleave(whole.shape[1], 0)
            ids = ids.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
            if known and 1 in axes:
                ties.tie(axes[1].ids, ids)
            else:  # each group has some of its own
                ties.axes[weight] = [a for a in axes.values() if a.dim != 1]
                ties.axes[weight] += [Axis(1, ids)] if each > 1 else []
    if transposed:
        return None if part is None else part.reshape(-1)
    return whole.reshape(-1)


def _join(ties: Ties, mine: Axis | None, given: Axis | None, where: str) -> None:
    """The columns of a weight and the channels that it is given."""
    if mine and given:
        ties.tie(mine.ids.reshape(-1), given.ids.reshape(-1))
    else:
        ties.fix([axis for axis in (mine, given) if axis], where)


def _deformable(
    ties: Ties,
    where: str,
    outs: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *sizes: Any,
) -> Found:
    """As a convolution; where it looks is not a matter of channels."""
    *_, groups, offset_groups, _ = sizes
    ties.fix(ties.of(offset) + ties.of(mask), where)
    if offset_groups > 1:
        ties.fix(ties.of(x), where)
    return _convolution(ties, where, outs, x, weight, bias, 1, 0, 1, False, 0, groups)


KERNELS: dict[str, Rule] = {
    **named(_convolution, "convolution"),
    **named(_deformable, "deform_conv2d"),
}
