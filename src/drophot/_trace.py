"""A forward pass, call by call: what each operator is given, gives, and ties."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from drophot._entries import entries
from drophot._latency import call
from drophot._rules import RULES, elementwise
from drophot._ties import Axis, Shape, Ties, View
from drophot._untouched import followed, untouched

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
        name = func.overloadpacket.__name__
        given = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        axes = [self.ties.of(t) for t in given]
        computed = any(t in self._computed or t in self.ties.names for t in given)
        out = func(*args, **kwargs)
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
        return out

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
            except Exception:  # called in a way that the rule does not know
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
        MemoryError: If there is no memory for them.
        torch.OutOfMemoryError: If a device has none.
    """
    turned: dict[View, int] = {}
    try:
        run(model, example_inputs, nullcontext())  # what it computes once, for all models
        while True:
            ties = Ties(model, whole_heads, turned)
            recorder = Recorder(ties)
            out = run(model, example_inputs, recorder, recorder.path)
            if ties.asked.keys() <= turned.keys():
                break
            turned = ties.asked | turned
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"`example_inputs` should be what the model is called with: a tensor, a tuple of "
            f"arguments or a dict. Found {type(error).__name__}: {error}"
        ) from error
    for tensor in tensors_in(out):
        ties.fix(ties.of(tensor), "an output of the network")
    training = Recorder(ties)
    try:
        out = run(model, example_inputs, training, training.path, training=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # it takes something else then: targets, more samples
        return ties, recorder.calls, []
    for tensor in tensors_in(out):
        ties.fix(ties.of(tensor), "an output of the network")
    known = {(c.path, c.name) for c in recorder.calls}
    news = [c for c in training.calls if (c.path, c.name) not in known and c.name not in RANDOM]
    return ties, recorder.calls, training.calls if news else []


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


def run(
    model: nn.Module,
    example_inputs: Any,
    mode: Any,
    path: list[str] | None = None,
    *,
    training: bool = False,
) -> Any:
    """Call a model under a dispatch mode, operator by operator; it stays as it was.

    Args:
        model: The model.
        example_inputs: What it is called with.
        mode: A context in which it is called.
        path: Where the modules that a call is in are kept, the last one innermost.
        training: Whether to call it in training mode.

    Returns:
        What it gives.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(remembered(model))
            stack.enter_context(untouched(model))
            if training:
                model.train()
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                stack.enter_context(_gate_by_gate())
            if path is not None:
                stack.enter_context(followed(model, path.append, path.pop))
            stack.enter_context(mode)
            return call(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _gate_by_gate() -> Iterator[None]:
    """Without libraries that do a recurrent layer at once."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


@contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """Put back attributes and buffers that a call changes: caches, counters, statistics.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    held = {
        id(value): (value, value.copy())
        for _, values in attributes
        for value in values.values()
        if isinstance(value, (dict, list, set))
    }
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for value, before in held.values():
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in what a network gives, in whatever holds them.

    Args:
        value: The output.

    Returns:
        The tensors, in order.
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
            return
        if value is None or isinstance(value, (str, bytes, int, float, complex, type)):
            return
        if id(value) in seen or isinstance(value, nn.Module):
            return
        seen.add(id(value))
        if isinstance(value, dict):
            inside = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = list(value)
        else:
            slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
            inside = [getattr(value, name, None) for name in slots if isinstance(name, str)]
            inside += list(getattr(value, "__dict__", {}).values())
        for one in inside:
            look(one)

    look(value)
    return found


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
