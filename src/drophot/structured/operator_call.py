"""One call of an operator as its rule sees it, and the rules for operators of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, SupportsIndex

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from drophot._core.interruptions import must_propagate
from drophot._core.operator_rules import check_rule, operator_of
from drophot._core.signatures import signature_error
from drophot.structured.dependency_graph import Axis, DependencyGraph
from drophot.structured.observations import UserError
from drophot.structured.reasons import inside, operation

# The axes of each output, or `None` if the rule does not cover this way of calling the operator.
OutputAxes = list[list[Axis]] | None
# Called with an `OperatorCall`, then with the arguments of the operator.
Rule = Callable[..., OutputAxes]
Dim = tuple[Tensor, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCall:
    """One call of an operator, as the first argument of a rule for it.

    A rule is a function `rule(call, *args, **kwargs)` that is called with the arguments of the
    operator. It couples the dimensions from which the same entries can be removed; see `couple`.
    The built-in rules get the same object and work on `graph` directly.

    Attributes:
        name: The operator's name, without its namespace.
        module: The path of the module in whose `forward` the operator is called.
        inputs: All tensors among the arguments, in order.
        outputs: All tensors that the operator returned, in order.
        graph: Internal: the entries of all tensors and how they are coupled.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from drophot.structured import prune_channels
        >>> def relu_rule(call, x):
        ...     call.couple((x, 1), (call.outputs[0], 1))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rules = {torch.ops.aten.relu: relu_rule}
        >>> prune_channels(model, 0.5, torch.ones(2, 4), rules=rules).layers["0.weight"]
        Change(before=8, after=4)
    """

    name: str
    module: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    graph: DependencyGraph = field(repr=False)
    _couplings: list[list[Dim]] = field(default_factory=list, init=False, repr=False)

    @property
    def reason(self) -> str:
        """Why channels that this call mixes are kept, as `Pruned.unpruned_layers` shows it."""
        return f"{operation(self.name)} in {inside(self.module)} needs all of its channels"

    def couple(self, *dims: tuple[Tensor, int]) -> None:
        """Let dimensions of inputs and outputs lose the same entries.

        Dimensions that no call of `couple` names keep all of their entries. A dimension that
        the operator sums over is coupled between inputs only.

        Args:
            *dims: Pairs of a tensor in `inputs` or `outputs` and a dimension of it, which may be
                negative. All of these dimensions must have the same size.

        Raises:
            TypeError: If an argument is not a pair of a tensor and an integer.
            ValueError: If a tensor does not belong to the call, a dimension does not exist, or
                sizes differ.

        Example:
            >>> def rule(call, x, weight):  # x @ weight.T
            ...     call.couple((x, -1), (weight, 1))  # summed over
            ...     call.couple((weight, 0), (call.outputs[0], -1))
        """
        coupling: list[Dim] = []
        for pair in dims:
            tensor, dim = self._checked_pair(pair)
            shape = tuple(tensor.shape)
            if not _contains((*self.inputs, *self.outputs), tensor):
                raise ValueError(
                    f"`couple` takes tensors of `call.inputs` and `call.outputs`, but the rule for "
                    f"`{self.name}` passed another tensor, of shape {shape}."
                )
            if not -len(shape) <= dim < len(shape):
                raise ValueError(
                    f"The rule for `{self.name}` couples dimension {dim} of a tensor of shape "
                    f"{shape}, which has {len(shape)} dimensions."
                )
            coupling.append((tensor, dim % len(shape)))
        sizes = [tensor.shape[dim] for tensor, dim in coupling]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"The rule for `{self.name}` couples dimensions of sizes {sizes}; coupled "
                f"dimensions must have the same size."
            )
        self._couplings.append(coupling)

    def _checked_pair(self, pair: object) -> Dim:
        if isinstance(pair, tuple | list) and len(pair) == 2:
            tensor, dim = pair
            if isinstance(tensor, Tensor) and isinstance(dim, SupportsIndex):
                return tensor, index(dim)
        raise TypeError(
            f"`couple` takes pairs of a tensor and a dimension, such as call.couple((x, 1), "
            f"(weight, 0)), but the rule for `{self.name}` passed {_shown(pair)}."
        )


def with_custom_rules(
    builtin: Mapping[str, Rule], rules: Mapping[Any, Callable[..., None]] | None
) -> dict[object, Rule]:
    """One table of rules: the built-in ones by operator name, the user's by operator.

    Raises:
        TypeError: If a key of `rules` is not an operator, or a value not a function that takes the
            operator's arguments.
        ValueError: If a key is a name that no operator has.
    """
    table: dict[object, Rule] = {**builtin}
    for operator, rule in (rules or {}).items():
        key = operator_of(operator)
        check_rule(key, rule)
        overloads = [key] if isinstance(key, OpOverload) else _overloads(key)
        errors = [_required_arguments_error(rule, overload) for overload in overloads]
        if errors and all(errors):
            raise TypeError(_wrong_arguments(str(key), errors[0]))
        table[key] = _by_couplings(rule)
    return table


def _overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()]


def _required_arguments_error(rule: Callable[..., None], operator: OpOverload) -> str:
    """Why a rule cannot take the arguments that every call of an operator has; empty if it can."""
    required = [one for one in operator._schema.arguments if not one.has_default_value()]
    args = [None for one in required if not one.kwarg_only]
    return signature_error(rule, None, *args, **{one.name: None for one in required[len(args) :]})


def _wrong_arguments(operator: str, error: str) -> str:
    return (
        f"`rules` must map operators to functions that take an OperatorCall and then the "
        f"operator's arguments, but the rule for {operator} cannot, {error}."
    )


def _shown(value: object) -> str:
    """A value in an error, without the numbers of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


def _by_couplings(rule: Callable[..., None]) -> Rule:
    def apply(call: OperatorCall, *args: Any, **kwargs: Any) -> OutputAxes:
        if wrong := signature_error(rule, call, *args, **kwargs):
            raise UserError(TypeError(_wrong_arguments(call.name, wrong)))
        try:
            rule(call, *args, **kwargs)
        except Exception as error:
            if must_propagate(error):
                raise
            raise UserError(error) from error
        return _coupled_axes(call)

    return apply


def _coupled_axes(call: OperatorCall) -> list[list[Axis]]:
    """The axes of each output that follow from what was coupled."""
    graph, groups = call.graph, _merged(call._couplings)
    found: list[list[Axis]] = [[] for _ in call.outputs]
    named = [pair for group in groups for pair in group]
    summed = [g for g in groups if not any(_contains(call.outputs, t) for t, _ in g)]
    # Parameters that are summed over, as the weight of a layer, produce the output's channels.
    matrices = [t for t in call.inputs if t in graph.names and any(_dims(g, t) for g in summed)]
    for tensor in call.inputs:
        dims = _dims(named, tensor)
        for axis in graph.axes_of(tensor):
            if axis.dim not in dims and not any(graph.request_dim(axis, d) for d in dims):
                graph.freeze([axis], call.reason)
    for group in groups:
        axes = [
            (tensor, next((a for a in graph.axes_of(tensor) if a.dim == dim), None))
            for tensor, dim in group
            if _contains(call.inputs, tensor)
        ]
        known = [(tensor, axis) for tensor, axis in axes if axis is not None]
        if not known or len(known) < len(axes):
            graph.freeze([axis for _, axis in known], call.reason)
            continue
        # With one dimension for each group, entries of different tensors can be compared.
        aligned: list[Tensor] = []
        for tensor, axis in known:
            apart = [d for d in range(tensor.dim()) if _is_apart(groups, group, tensor, d)]
            rest = [d for d in range(tensor.dim()) if d not in apart]
            aligned.append(_aligned(graph.uniform(axis, rest).ids, tensor, groups))
        for other in aligned[1:]:
            graph.couple(aligned[0], other)
        ids = max(aligned, key=Tensor.numel)
        for number, out in enumerate(call.outputs):
            for dim in _dims(group, out):
                own = _of_output(ids, out, dim, group, groups)
                found[number].append(Axis(dim, own))
                if any(_contains(matrices, tensor) for tensor, _ in known):
                    graph.matrix_outputs.append(own.reshape(-1))
    return found


def _contains(tensors: Sequence[Tensor], tensor: Tensor) -> bool:
    return any(tensor is one for one in tensors)


def _dims(group: Sequence[Dim], tensor: Tensor) -> list[int]:
    return [dim for one, dim in group if one is tensor]


def _merged(couplings: Sequence[Sequence[Dim]]) -> list[list[Dim]]:
    """Couplings without repeated dimensions; those that share a dimension become one."""
    groups: list[list[Dim]] = []
    for coupling in couplings:
        merged: list[Dim] = []
        rest: list[list[Dim]] = []
        for group in groups:
            shared = any(dim in _dims(group, tensor) for tensor, dim in coupling)
            if shared:
                merged += group
            else:
                rest.append(group)
        for tensor, dim in coupling:
            if dim not in _dims(merged, tensor):
                merged.append((tensor, dim))
        groups = [*rest, merged]
    return groups


def _is_apart(groups: list[list[Dim]], group: list[Dim], tensor: Tensor, dim: int) -> bool:
    """Whether each row along a group may lose different entries for each index of `dim`.

    That is so if the operator keeps the indices of `dim` apart in all tensors of the group.
    """
    other = next((g for g in groups if g is not group and dim in _dims(g, tensor)), None)
    return other is not None and all(
        len(_dims(group, one)) == len(_dims(other, one)) == 1 for one, _ in group
    )


def _aligned(ids: Tensor, tensor: Tensor, groups: list[list[Dim]]) -> Tensor:
    """Entries of a tensor with one dimension for each group of coupled dimensions."""
    own = [(_dims(group, tensor) or [None])[0] for group in groups]
    order = [dim for dim in own if dim is not None]
    rest = [dim for dim in range(ids.dim()) if dim not in order]
    sizes = [1 if dim is None else ids.size(dim) for dim in own]
    return ids.permute(order + rest).reshape(sizes)


def _of_output(
    ids: Tensor, out: Tensor, dim: int, group: list[Dim], groups: list[list[Dim]]
) -> Tensor:
    """Aligned entries in the layout of an output, along its dimension `dim` of a group."""
    group_of_dim = {
        dim if g is group else (_dims(g, out) or [-1])[0]: n for n, g in enumerate(groups)
    }
    group_of_dim.pop(-1, None)
    order = [group_of_dim[d] for d in sorted(group_of_dim)]
    rest = [n for n in range(len(groups)) if n not in order]
    sizes = [ids.size(group_of_dim[d]) if d in group_of_dim else 1 for d in range(out.dim())]
    return ids.permute(order + rest).reshape(sizes)
