"""Whether a network without some channels does, call by call, what it did with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from drophot._core.interruptions import must_propagate
from drophot.structured.observations import Seen, Stop, guarded, print_of
from drophot.structured.reasons import operation
from drophot.structured.remaining_sizes import left_of, taken
from drophot.structured.tracer import Call, flat, is_view, numbers

# Not compared as plain values: DataParallel opens the profiler's records.
OPAQUE = (Tensor, torch.ScriptObject)


class Check(TorchDispatchMode):
    """Compares what a network does with what it did.

    Each call has to be the same operator, with the same numbers but for sizes, and to give the
    shapes that follow from what is gone. Where it does not, the call is noted, and what follows
    goes on with a tensor of the right shape, so that one look finds everything. What a network
    decides by its values (masks, indices, numbers) is what it decided with all channels.

    Args:
        calls: What it did.
        gone: The entries that are gone.
        prints: Whether to keep sums of what each call gives.
        shapes: Of what each call is to give.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        gone: Tensor,
        prints: bool,
        shapes: Sequence[list[tuple[int, ...]]],
    ) -> None:
        super().__init__()
        self.shapes = shapes
        self.calls = calls
        self.gone = gone
        self.prints = prints
        self.seen = Seen()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with guarded():
            return self._compare(func, args, kwargs or {})

    def _compare(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, seen = _layout(func.overloadpacket.__name__), self.seen
        while name != "clone" and self._next() == "clone":  # it was needed for the layout then
            seen.prints.append([])
            seen.end += 1
        if name == "clone" != self._next():
            return func(*args, **kwargs)
        number = seen.end
        if {self._next(), name} == {"slice", "alias"}:  # of all that is left, or not of all
            seen.failures[number] = "size"
            seen.end += 1
            return self._forced(self.calls[number], self.shapes[number])
        if self._next() != name:
            seen.failures[min(number, len(self.calls) - 1)] = (
                f"code: goes another way with fewer channels, to {operation(name)}"
            )
            raise Stop
        call = self.calls[number]
        seen.end += 1
        if call.numbers is not None:
            found = numbers(name, args, kwargs, [])
            if found is not None and not _equal(found, call.numbers):
                seen.failures[number] = _other(found, call.numbers)
        shapes = self.shapes[number]
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            if must_propagate(error):
                raise
            seen.failures[number] = "size"
            return self._forced(call, shapes)
        leaves, spec = tree_flatten(out)
        outs = [t for t in leaves if isinstance(t, Tensor)]
        given = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        if len(outs) == len(shapes):
            out, leaves = self._decided(call, out, leaves, spec, shapes, given, number)
            outs = [t for t in leaves if isinstance(t, Tensor)]
        found = [tuple(t.shape) for t in outs]
        if found != shapes:
            seen.failures.setdefault(number, "size")
            return self._forced(call, shapes)
        if self.prints:
            seen.prints.append([print_of(t) for t in outs])
        return out

    def _next(self) -> str | None:
        number = self.seen.end
        return _layout(self.calls[number].name) if number < len(self.calls) else None

    def _decided(
        self,
        call: Call,
        out: Any,
        leaves: list[Any],
        spec: Any,
        shapes: list[tuple[int, ...]],
        given: list[Tensor],
        number: int,
    ) -> tuple[Any, list[Any]]:
        """What was decided then, instead of what is decided now."""
        place, changed = 0, False
        for i, (leaf, before) in enumerate(zip(leaves, call.leaves, strict=False)):
            axes = []
            if isinstance(leaf, Tensor):
                axes = call.outputs[place] if place < len(call.outputs) else []
                place += 1
            if isinstance(before, Tensor):
                kept = taken(before, [a for a in axes if self.gone[a.ids].any()], self.gone)
                if kept.shape == leaf.shape and torch.equal(kept, leaf):
                    continue
                if not call.computed:
                    if kept.shape == leaf.shape:
                        self.seen.failures[number] = (
                            "its result follows from the number of channels"
                        )
                elif kept.shape == leaf.shape and not is_view(leaf, given):
                    leaf.copy_(kept)
                else:
                    leaves[i], changed = kept.clone(), True
            elif not isinstance(leaf, OPAQUE) and not isinstance(before, tuple):
                if leaf != before and not call.computed:
                    self.seen.failures[number] = (
                        f"its result, {before}, follows from the number of channels"
                    )
                leaves[i], changed = before, True
        return (tree_unflatten(leaves, spec) if changed else out), leaves

    def _forced(self, call: Call, shapes: list[tuple[int, ...]]) -> Any:
        """What a call was to give, as far as its shape goes."""
        left, leaves = list(shapes), []
        for place, leaf in enumerate(call.leaves):
            if isinstance(leaf, Tensor):
                axes = call.outputs[place] if place < len(call.outputs) else []
                axes = [axis for axis in axes if self.gone[axis.ids].any()]
                leaves.append(taken(leaf, axes, self.gone).clone())
                left.pop(0)
            elif isinstance(leaf, tuple) and left:
                leaves.append(torch.zeros(left.pop(0), dtype=leaf[0], device=leaf[1]))
            else:
                leaves.append(leaf)
        out = tree_unflatten(leaves, call.spec)
        if self.prints:
            outs = [t for t in leaves if isinstance(t, Tensor)]
            self.seen.prints.append([print_of(t) for t in outs])
        return out


def shapes_left(calls: Sequence[Call], gone: Tensor) -> list[list[tuple[int, ...]]]:
    """The shapes of what each call is to give."""
    return [
        [
            left_of(shape, call.outputs[i] if i < len(call.outputs) else [], gone)
            for i, shape in enumerate(call.shapes)
        ]
        for call in calls
    ]


def _layout(name: str) -> str:
    """Operators that differ by how tensors lie in memory only."""
    return "view" if name in ("_unsafe_view", "_reshape_alias") else name


def _equal(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        a == b or (a != a and b != b) for a, b in zip(some, others, strict=True)
    )


def _other(found: list[Any], before: list[Any]) -> str:
    for a, b in zip(found, before, strict=False):
        if a != b:
            return f"a number follows from the number of channels, {b:.6g} with all of them"
    return "its numbers follow from the number of channels"
