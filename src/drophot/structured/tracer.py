"""Records a forward pass, operator by operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from drophot._core.interruptions import must_propagate
from drophot.structured.dependency_graph import Axis, DependencyGraph, View
from drophot.structured.entry_trials import axes_by_trial
from drophot.structured.layer_rules import elementwise
from drophot.structured.observations import UserError, guarded
from drophot.structured.operator_call import OperatorCall, Rule
from drophot.structured.product_cost import product_of
from drophot.structured.reasons import OUTPUT
from drophot.structured.recorded_call import RecordedCall, flat, numbers, recorded_leaf
from drophot.structured.reshape_rules import MAKES_AXES
from drophot.structured.single_call import run, tensors_in


class Recorder(TorchDispatchMode):
    """Records the operators that a network calls, and adds what they couple to a graph."""

    def __init__(self, graph: DependencyGraph, rules: Mapping[object, Rule]) -> None:
        super().__init__()
        self.graph = graph
        self.rules = rules
        self.path: list[str] = [""]
        self.calls: list[RecordedCall] = []
        self._computed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        with guarded():
            axes = [self.graph.axes_of(t) for t in inputs]
            before = args
            if torch.Tag.inplace_view in func.tags:  # the argument will have another shape
                before = (args[0].detach(), *args[1:])
                self.graph.axes[before[0]] = axes[0]
        out = func(*args, **kwargs)
        with guarded():
            self._record(func, before, kwargs, inputs, axes, out)
        return out

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        axes: list[list[Axis]],
        out: Any,
    ) -> None:
        name = func.overloadpacket.__name__
        computed = any(t in self._computed or t in self.graph.names for t in inputs)
        leaves, spec = tree_flatten(out)
        outputs = [t for t in leaves if isinstance(t, Tensor)]
        found = self._output_axes(func, args, kwargs, inputs, outputs, any(axes))
        for tensor, own in zip(outputs, found, strict=False):
            self.graph.axes[tensor] = own
            if computed:
                self._computed[tensor] = True
        self.calls.append(
            RecordedCall(
                name,
                tuple(self.path),
                axes,
                numbers(name, args, kwargs, axes[0] if axes else []),
                [t.shape for t in outputs],
                found,
                [recorded_leaf(name, leaf, inputs) for leaf in leaves],
                spec,
                computed,
                product_of(func, args, kwargs),
            )
        )

    def _output_axes(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
        has_axes: bool,
    ) -> list[list[Axis]]:
        """What an operator couples: by its rule, or else by calling it with fewer entries."""
        rule = self._rule(func)
        if not has_axes and rule not in MAKES_AXES:
            return [[] for _ in outputs]
        self.graph.module = self.path[-1]
        name = func.overloadpacket.__name__
        call = OperatorCall(
            name=name, module=self.path[-1], inputs=inputs, outputs=outputs, graph=self.graph
        )
        if rule is not None:
            try:
                found = rule(call, *args, **kwargs)
            except Exception as error:  # called in a way that the rule does not cover
                if must_propagate(error):
                    raise
                found = None
            if found is not None:
                return found
        found = axes_by_trial(call, func, args, kwargs)
        if found is not None:
            return found
        for tensor in tree_leaves((args, kwargs)):
            self.graph.freeze(self.graph.axes_of(tensor), call.reason)
        return [[] for _ in outputs]

    def _rule(self, func: Any) -> Rule | None:
        """The user's rule for an operator, or the built-in one, which is found by its name."""
        name = func.overloadpacket.__name__
        keys: list[object] = [func, func.overloadpacket]
        if func.namespace in BUILTIN:
            keys += [name, name.removesuffix("_")]
        rule = next((self.rules[key] for key in keys if key in self.rules), None)
        if rule is None and torch.Tag.pointwise in func.tags:
            return elementwise
        return rule


BUILTIN = frozenset(["aten", "prims", "torchvision"])  # namespaces that built-in rules are for


def record(
    model: nn.Module,
    example_inputs: Any,
    whole_heads: Collection[tuple[str, int]],
    rules: Mapping[object, Rule],
) -> tuple[DependencyGraph, list[RecordedCall], list[RecordedCall]]:
    """Record one forward pass in evaluation mode and one in training mode.

    Args:
        model: The network.
        example_inputs: The inputs to call it with.
        whole_heads: Modules, and the width of the heads in them that are removed only as a whole.
        rules: The table of `with_custom_rules`.

    Returns:
        The graph of coupled entries, the calls in evaluation mode in order, and the calls in
        training mode if these include other operators.

    Raises:
        ValueError: If the model does not take the inputs.
        UserError: If the model's code, or a rule of the user's, raises another error.
    """
    try:
        run(model, example_inputs, nullcontext())  # lets the model fill its caches
    except Exception as error:
        if must_propagate(error):
            raise
        if type(error) not in MISFIT:
            raise UserError(error) from error
        raise ValueError(
            f"`example_inputs` must be a tensor, a tuple of positional arguments or a dict of "
            f"keyword arguments that the model takes. Calling the model raised "
            f"{type(error).__name__}: {error}"
        ) from error
    view_dims: dict[View, int] = {}
    while True:
        graph = DependencyGraph(model, whole_heads, view_dims)
        recorder = Recorder(graph, rules)
        try:
            out = run(model, example_inputs, recorder, recorder.path)
        except Exception as error:
            if must_propagate(error):
                raise
            raise UserError(error) from error
        if graph.requested_dims.keys() <= view_dims.keys():
            break
        view_dims = graph.requested_dims | view_dims
    for tensor in tensors_in(out):
        graph.freeze(graph.axes_of(tensor), OUTPUT)
    training = Recorder(graph, rules)
    try:
        out = run(model, example_inputs, training, training.path, training=True)
    except Exception as error:
        if must_propagate(error):
            raise
        # In training mode it takes something else, such as targets or more samples.
        return graph, recorder.calls, []
    for tensor in tensors_in(out):
        graph.freeze(graph.axes_of(tensor), OUTPUT)
    known = {(c.path, c.name) for c in recorder.calls}
    new = [c for c in training.calls if (c.path, c.name) not in known and c.name not in RANDOM]
    return graph, recorder.calls, training.calls if new else []


# Errors of torch and Python that say that a model does not take its inputs.
MISFIT = (TypeError, RuntimeError, ValueError, IndexError, AttributeError, AssertionError)

# Operators of dropout and norms in training mode, whose shapes are those of evaluation.
RANDOM = frozenset([
    "native_dropout",
    "bernoulli",
    "bernoulli_",
    "new_empty",
    "rand_like",
    "div_",
    "div",
    "mul",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "add_",
    "empty_like",
    "rand",
    "floor_",
    "floor",
])
