"""A forward pass, call by call: what it ties, and whether it is still the same one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drophot._latency import call
from drophot._rules import RULES, elementwise
from drophot._ties import Axis, Shape, Ties
from drophot._untouched import followed, untouched


class Call(NamedTuple):
    """One operator: in which modules it is called, with what, and what it gives."""

    name: str
    path: tuple[str, ...]
    inputs: list[Axis]
    shapes: Sequence[Shape]
    outputs: list[list[Axis]]


class Mismatch(Exception):  # noqa: N818 (not for users)
    """The network, pruned, does not do at a call what it did before."""

    def __init__(self, number: int, found: str) -> None:
        super().__init__(found)
        self.number = number
        self.found = found


class Tracer(TorchDispatchMode):
    """Records what a network does, or compares it with what it was to do.

    Args:
        ties: Where to record.
        expected: What each call gives, by shape, to compare; `None` records.
    """

    def __init__(
        self, ties: Ties, expected: list[tuple[str, list[tuple[int, ...]]]] | None = None
    ) -> None:
        super().__init__()
        self.ties = ties
        self.expected = expected
        self.number = 0
        self.path: list[str] = [""]
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if self.expected is None:
            inputs = [axis for t in tree_leaves((args, kwargs)) for axis in self.ties.of(t)]
            out = func(*args, **(kwargs or {}))
            outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            found = self._rule(func, name, args, kwargs or {}, outs) if inputs else []
            for tensor, axes in zip(outs, found, strict=False):
                self.ties.axes[tensor] = axes
            shapes = [t.shape for t in outs]
            self.calls.append(Call(name, tuple(self.path), inputs, shapes, found))
            return out
        number, self.number = self.number, self.number + 1
        if number == len(self.expected) or self.expected[number][0] != name:
            raise Mismatch(min(number, len(self.expected) - 1), f"another call, {name}")
        try:
            out = func(*args, **(kwargs or {}))
        except Exception as error:
            raise Mismatch(number, f"{type(error).__name__}: {error}") from error
        shapes = [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]
        if shapes != self.expected[number][1]:
            raise Mismatch(number, f"{name} gave {shapes} instead of {self.expected[number][1]}")
        return out

    def _rule(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor]
    ) -> list[list[Axis]]:
        where = f"{name} in {self.path[-1] or 'the model'}"
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = elementwise
        if rule is not None:
            found = rule(self.ties, where, outs, *args, **kwargs)
            if found is not None:
                return found
        for tensor in tree_leaves((args, kwargs)):
            self.ties.fix(self.ties.of(tensor), where)
        return [[] for _ in outs]


def record(model: nn.Module, example_inputs: Any) -> tuple[Ties, list[Call]]:
    """What has to go together in a network, and what it does.

    Args:
        model: The network.
        example_inputs: What it is called with.

    Returns:
        The ties, and the calls in order.

    Raises:
        ValueError: If the model does not take the inputs.
    """
    ties = Ties(model)
    tracer = Tracer(ties)
    try:
        out = _call(model, example_inputs, tracer)
    except Exception as error:
        raise ValueError(
            f"`example_inputs` should be what the model is called with: a tensor, a tuple of "
            f"arguments or a dict. Found {type(error).__name__}: {error}"
        ) from error
    for tensor in tree_leaves(out):
        ties.fix(ties.of(tensor), "an output of the network")
    return ties, tracer.calls


def compare(
    model: nn.Module, example_inputs: Any, expected: list[tuple[str, list[tuple[int, ...]]]]
) -> None:
    """Run a network and see that it does what it was to do.

    Args:
        model: The network.
        example_inputs: What it is called with.
        expected: Each call's name, and the shapes that it is to give.

    Raises:
        Mismatch: At the first call that gives something else.
    """
    tracer = Tracer(Ties(model), expected)
    try:
        _call(model, example_inputs, tracer)
    except Mismatch:
        raise
    except Exception as error:
        raise Mismatch(min(tracer.number, len(expected) - 1), str(error)) from error
    if tracer.number < len(expected):
        raise Mismatch(tracer.number, "fewer calls")


def _call(model: nn.Module, example_inputs: Any, tracer: Tracer) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # operator by operator
    try:
        with (
            untouched(model),
            sdpa_kernel(SDPBackend.MATH),
            followed(model, tracer.path.append, tracer.path.pop),
            tracer,
        ):
            return call(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
