"""A forward pass, call by call: what each operator is given, gives, and ties."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from drophot._core.interruptions import must_propagate
from drophot.structured.dependency_graph import Axis, Shape, Ties, View
from drophot.structured.entry_trials import entries
from drophot.structured.layer_rules import RULES, elementwise
from drophot.structured.observations import UsersError, guarded
from drophot.structured.single_call import run, tensors_in

# Operators whose whole numbers are sizes, which follow from the channels that are left.
SIZED = frozenset([
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "expand",
    "repeat",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "chunk",
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
    "as_strided",
    "as_strided_",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "new_empty_strided",
    "empty_strided",
])


@dataclass(frozen=True, slots=True)
class Call:
    """One operator: in which modules it is called, with what, and what it gives."""

    name: str
    path: tuple[str, ...]
    given: list[list[Axis]]  # of each tensor that it is called with
    numbers: list[Any] | None  # that it is called with and that do not follow from a width
    shapes: Sequence[Shape]
    outputs: list[list[Axis]]
    leaves: list[Any]  # what it gave: numbers, whole-number tensors, and how others look
    spec: TreeSpec
    computed: bool  # from parameters, so that pruning may change its values

    @property
    def inputs(self) -> list[Axis]:
        """The axes of all tensors that it is called with."""
        return [axis for axes in self.given for axis in axes]

    @property
    def axes(self) -> list[Axis]:
        """The axes of all tensors that it is called with or gives."""
        return self.inputs + [axis for axes in self.outputs for axis in axes]


class Recorder(TorchDispatchMode):
    """Records what a network does.

    Args:
        ties: Where to record what has to go together.
    """

    def __init__(self, ties: Ties) -> None:
        super().__init__()
        self.ties = ties
        self.path: list[str] = [""]
        self.calls: list[Call] = []
        self._computed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        with guarded():
            axes = [self.ties.of(t) for t in given]
            before = args
            if torch.Tag.inplace_view in func.tags:  # whose argument has another shape afterwards
                before = (args[0].detach(), *args[1:])
                self.ties.axes[before[0]] = axes[0]
        out = func(*args, **kwargs)
        with guarded():
            self._record(func, before, kwargs, given, axes, out)
        return out

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        axes: list[list[Axis]],
        out: Any,
    ) -> None:
        name = func.overloadpacket.__name__
        computed = any(t in self._computed or t in self.ties.names for t in given)
        leaves, spec = tree_flatten(out)
        outs = [t for t in leaves if isinstance(t, Tensor)]
        found = self._rule(func, name, args, kwargs, outs, any(axes))
        for tensor, own in zip(outs, found, strict=False):
            self.ties.axes[tensor] = own
            if computed:
                self._computed[tensor] = True
        self.calls.append(
            Call(
                name,
                tuple(self.path),
                axes,
                numbers(name, args, kwargs, axes[0] if axes else []),
                [t.shape for t in outs],
                found,
                [_remembered(name, leaf, given) for leaf in leaves],
                spec,
                computed,
            )
        )

    def _rule(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Any,
        outs: list[Tensor],
        met: bool,
    ) -> list[list[Axis]]:
        where = f"{name} in {self.path[-1] or 'the model'}"
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = elementwise
        if not met and not getattr(rule, "makes_axes", False):
            return [[] for _ in outs]
        self.ties.path = self.path[-1]
        if rule is not None:
            try:
                found = rule(self.ties, where, outs, *args, **kwargs)
            except Exception as error:  # called in a way that the rule does not know
                if must_propagate(error):
                    raise
                found = None
            if found is not None:
                return found
        found = entries(self.ties, where, func, args, kwargs)
        if found is not None:
            return found
        for tensor in tree_leaves((args, kwargs)):
            self.ties.fix(self.ties.of(tensor), where)
        return [[] for _ in outs]


def record(
    model: nn.Module, example_inputs: Any, whole_heads: Collection[tuple[str, int]] = ()
) -> tuple[Ties, list[Call], list[Call]]:
    """What has to go together in a network, and what it does.

    Args:
        model: The network.
        example_inputs: What it is called with.
        whole_heads: Modules, and the width of heads in them that go as a whole or not at all.

    Returns:
        The ties, the calls in evaluation mode in order, and those in training mode where it does
        something else then.

    Raises:
        ValueError: If the model does not take the inputs.
        UsersError: If the model's code raises an error of another kind.
    """
    try:
        run(model, example_inputs, nullcontext())  # what it computes once, for all models
    except Exception as error:
        if must_propagate(error):
            raise
        if type(error) not in MISFIT:
            raise UsersError(error) from error
        raise ValueError(
            f"`example_inputs` should be what the model is called with: a tensor, a tuple of "
            f"arguments or a dict. Found {type(error).__name__}: {error}"
        ) from error
    turned: dict[View, int] = {}
    while True:
        ties = Ties(model, whole_heads, turned)
        recorder = Recorder(ties)
        try:
            out = run(model, example_inputs, recorder, recorder.path)
        except Exception as error:
            if must_propagate(error):
                raise
            raise UsersError(error) from error
        if ties.asked.keys() <= turned.keys():
            break
        turned = ties.asked | turned
    for tensor in tensors_in(out):
        ties.fix(ties.of(tensor), "an output of the network")
    training = Recorder(ties)
    try:
        out = run(model, example_inputs, training, training.path, training=True)
    except Exception as error:
        if must_propagate(error):
            raise
        # It takes something else then: targets, more samples.
        return ties, recorder.calls, []
    for tensor in tensors_in(out):
        ties.fix(ties.of(tensor), "an output of the network")
    known = {(c.path, c.name) for c in recorder.calls}
    news = [c for c in training.calls if (c.path, c.name) not in known and c.name not in RANDOM]
    return ties, recorder.calls, training.calls if news else []


# What torch and Python raise where a model does not fit what it is called with.
MISFIT = (TypeError, RuntimeError, ValueError, IndexError, AttributeError, AssertionError)

# What dropout and norms do in training only; shapes are those of evaluation.
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


def numbers(name: str, args: Any, kwargs: Any, axes: list[Axis]) -> list[Any] | None:
    """The numbers that an operator is called with, but for sizes.

    Args:
        name: The operator's.
        args: What it is called with.
        kwargs: By name.
        axes: Of its first tensor.

    Returns:
        The numbers in order, or `None` where all of them may be sizes.
    """
    if name == "slice":
        dim = (args[1] if len(args) > 1 else 0) % max(args[0].dim(), 1)
        if any(axis.dim == dim for axis in axes):
            return None
    if name == "convolution":
        args = args[:8]  # without the number of groups
    return [
        value
        for value in flat((args, kwargs))
        if isinstance(value, float) or (isinstance(value, int) and name not in SIZED)
    ]


def flat(value: Any) -> Iterator[Any]:
    """What an operator is called with, one by one: its lists are plain ones."""
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from flat(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from flat(one)
    else:
        yield value


def is_view(out: Tensor, given: Sequence[Tensor]) -> bool:
    """Whether a tensor shares its values with one that an operator was called with."""
    storage = out.untyped_storage()._cdata if out.layout == torch.strided else None
    return storage is not None and any(
        t.layout == torch.strided and t.untyped_storage()._cdata == storage for t in given
    )


def _remembered(name: str, leaf: Any, given: Sequence[Tensor]) -> Any:
    """A number, a copy of a tensor of whole numbers, or how a tensor looks."""
    if not isinstance(leaf, Tensor):
        return leaf
    if (
        leaf.is_floating_point()
        or leaf.is_complex()
        or "pool" in name
        or "empty" in name  # whatever was there
        or (is_view(leaf, given) and not name.endswith("_"))
    ):
        return leaf.dtype, leaf.device
    return leaf.detach().clone()
