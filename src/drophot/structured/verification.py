"""Checks, call by call, that a network without some channels behaves as with them at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from drophot._core.interruptions import must_propagate
from drophot.structured.checked_pass import CheckedPass, axes_of_output
from drophot.structured.observations import StopPass, fingerprint
from drophot.structured.reasons import operation
from drophot.structured.recorded_call import RecordedCall, flat, is_view, numbers
from drophot.structured.remaining_sizes import kept_part, kept_shape

# Not compared as plain values; DataParallel passes records of the profiler.
OPAQUE = (Tensor, torch.ScriptObject)


class PrunedPass(CheckedPass):
    """Compares the calls of a pruned network with the recorded ones.

    Each call has to be the same operator, with the same numbers except for sizes, and has to return
    the shapes that follow from the removed entries. If it does not, the failure is noted and the
    pass continues with a tensor of the right shape, so that one pass finds all failures. Masks,
    indices and other decisions by value are those of the network with all channels.

    Args:
        calls: The recorded calls.
        removed: Whether each entry is removed.
        fingerprints: Whether to keep sums of the outputs of each call.
        shapes: The shapes that each call has to return.
    """

    def __init__(
        self,
        calls: Sequence[RecordedCall],
        removed: Tensor,
        fingerprints: bool,
        shapes: Sequence[list[tuple[int, ...]]],
    ) -> None:
        super().__init__(calls, removed, fingerprints)
        self.shapes = shapes

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, result = _canonical(func.overloadpacket.__name__), self.result
        while name != "clone" and self._next_name() == "clone":  # for the layout
            result.fingerprints.append([])
            result.num_reached += 1
        if name == "clone" != self._next_name():
            return func(*args, **kwargs)
        number = result.num_reached
        if {self._next_name(), name} == {"slice", "alias"}:  # a slice of everything is an alias
            result.failures[number] = "size"
            result.num_reached += 1
            return self._recorded_result(self.calls[number], self.shapes[number])
        if self._next_name() != name:
            result.failures[min(number, len(self.calls) - 1)] = (
                f"code: calls other operators with fewer channels, such as {operation(name)}"
            )
            raise StopPass
        call = self.calls[number]
        result.num_reached += 1
        if call.numbers is not None:
            found = numbers(name, args, kwargs, [])
            if found is not None and not _equal(found, call.numbers):
                result.failures[number] = _changed_number(found, call.numbers)
        shapes = self.shapes[number]
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            if must_propagate(error):
                raise
            result.failures[number] = "size"
            return self._recorded_result(call, shapes)
        leaves, spec = tree_flatten(out)
        outs = [t for t in leaves if isinstance(t, Tensor)]
        inputs = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        if len(outs) == len(shapes):
            out, leaves = self._with_recorded_values(
                call, out, leaves, spec, shapes, inputs, number
            )
            outs = [t for t in leaves if isinstance(t, Tensor)]
        found = [tuple(t.shape) for t in outs]
        if found != shapes:
            result.failures.setdefault(number, "size")
            return self._recorded_result(call, shapes)
        if self.fingerprints:
            result.fingerprints.append([fingerprint(t) for t in outs])
        return out

    def _next_name(self) -> str | None:
        number = self.result.num_reached
        return _canonical(self.calls[number].name) if number < len(self.calls) else None

    def _with_recorded_values(
        self,
        call: RecordedCall,
        out: Any,
        leaves: list[Any],
        spec: Any,
        shapes: list[tuple[int, ...]],
        inputs: list[Tensor],
        number: int,
    ) -> tuple[Any, list[Any]]:
        """The result with the integers and masks of the recorded call."""
        position, changed = 0, False
        for i, (leaf, before) in enumerate(zip(leaves, call.leaves, strict=False)):
            axes = []
            if isinstance(leaf, Tensor):
                axes = axes_of_output(call, position)
                position += 1
            if isinstance(before, Tensor):
                expected = kept_part(before, self.shrinking(axes), self.removed)
                if expected.shape == leaf.shape and torch.equal(expected, leaf):
                    continue
                if not call.computed:
                    if expected.shape == leaf.shape:
                        self.result.failures[number] = (
                            "its result depends on the number of channels"
                        )
                elif expected.shape == leaf.shape and not is_view(leaf, inputs):
                    leaf.copy_(expected)
                else:
                    leaves[i], changed = expected.clone(), True
            elif not isinstance(leaf, OPAQUE) and not isinstance(before, tuple):
                if leaf != before and not call.computed:
                    self.result.failures[number] = (
                        f"its result depends on the number of channels ({before} with all of them)"
                    )
                leaves[i], changed = before, True
        return (tree_unflatten(leaves, spec) if changed else out), leaves

    def _recorded_result(self, call: RecordedCall, shapes: list[tuple[int, ...]]) -> Any:
        """A result of the right shape for a call that failed."""
        pending, leaves = list(shapes), []
        for position, leaf in enumerate(call.leaves):
            if isinstance(leaf, Tensor):
                axes = self.shrinking(axes_of_output(call, position))
                leaves.append(kept_part(leaf, axes, self.removed).clone())
                pending.pop(0)
            elif isinstance(leaf, tuple) and pending:
                leaves.append(torch.zeros(pending.pop(0), dtype=leaf[0], device=leaf[1]))
            else:
                leaves.append(leaf)
        out = tree_unflatten(leaves, call.spec)
        if self.fingerprints:
            outs = [t for t in leaves if isinstance(t, Tensor)]
            self.result.fingerprints.append([fingerprint(t) for t in outs])
        return out


def kept_shapes(calls: Sequence[RecordedCall], removed: Tensor) -> list[list[tuple[int, ...]]]:
    """The shapes that each call has to return without the removed entries."""
    return [
        [kept_shape(shape, axes_of_output(call, i), removed) for i, shape in enumerate(call.shapes)]
        for call in calls
    ]


def _canonical(name: str) -> str:
    """One name for operators that differ only in the memory layout of their result."""
    return "view" if name in ("_unsafe_view", "_reshape_alias") else name


def _equal(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        a == b or (a != a and b != b) for a, b in zip(some, others, strict=True)
    )


def _changed_number(found: list[Any], before: list[Any]) -> str:
    for a, b in zip(found, before, strict=False):
        if a != b:
            return f"a number depends on the number of channels ({b:.6g} with all of them)"
    return "its numbers depend on the number of channels"
