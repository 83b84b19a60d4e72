"""Whether a network without some channels does, call by call, what it did with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from drophot._sums import OVER
from drophot._ties import Axis
from drophot._trace import Call, is_view, numbers, run, tensors_in

MEMORY = (MemoryError, torch.OutOfMemoryError)
# Not compared as plain values: DataParallel opens the profiler's records.
OPAQUE = (Tensor, torch.ScriptObject)


@dataclass(slots=True)
class Seen:
    """What was seen of a call of the network."""

    failures: dict[int, str] = field(default_factory=dict)
    """Why a call does not do what it did, by its number."""
    end: int = 0
    """The number of calls that were reached."""
    outputs: list[Tensor] = field(default_factory=list)
    """What the network gave, if it came to its end."""
    prints: list[list[Tensor]] = field(default_factory=list)
    """A few sums of what each call gave."""
    error: Exception | None = None
    """What the network's own code raised."""


class _Stop(BaseException):
    """Nothing can be compared any more."""


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
    """

    def __init__(self, calls: Sequence[Call], gone: Tensor, prints: bool) -> None:
        super().__init__()
        self.calls = calls
        self.gone = gone
        self.prints = prints
        self.seen = Seen()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name, seen = _layout(func.overloadpacket.__name__), self.seen
        while name != "clone" and self._next() == "clone":  # it was needed for the layout then
            seen.prints.append([])
            seen.end += 1
        if name == "clone" != self._next():
            return func(*args, **kwargs)
        number = seen.end
        if self._next() != name:
            why = (
                "the code takes as many as there were, by a number that is not found in a module"
                if (self._next(), name) == ("slice", "alias")
                else f"the code then calls {name} instead of {self._next() or 'nothing more'}"
            )
            seen.failures[min(number, len(self.calls) - 1)] = why
            raise _Stop
        call = self.calls[number]
        seen.end += 1
        if call.numbers is not None:
            found = numbers(name, args, kwargs, [])
            if found is not None and not _equal(found, call.numbers):
                seen.failures[number] = _other(found, call.numbers)
        shapes = [left_of(shape, axes, self.gone) for shape, axes in _shaped(call)]
        try:
            out = func(*args, **kwargs)
        except MEMORY:
            raise
        except Exception as error:
            seen.failures[number] = str(error).splitlines()[0] if str(error) else repr(error)
            return self._forced(call, shapes)
        leaves, spec = tree_flatten(out)
        outs = [t for t in leaves if isinstance(t, Tensor)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if len(outs) == len(shapes):
            out, leaves = self._decided(call, out, leaves, spec, shapes, given, number)
            outs = [t for t in leaves if isinstance(t, Tensor)]
        found = [tuple(t.shape) for t in outs]
        if found != shapes:
            seen.failures.setdefault(number, f"it gives {_sizes(found)}, not {_sizes(shapes)}")
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
                        self.seen.failures[number] = "it gives other values"
                elif kept.shape == leaf.shape and not is_view(leaf, given):
                    leaf.copy_(kept)
                else:
                    leaves[i], changed = kept.clone(), True
            elif not isinstance(leaf, OPAQUE) and not isinstance(before, tuple):
                if leaf != before and not call.computed:
                    self.seen.failures[number] = f"it gives {leaf}, not {before}"
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


class Zeroed(TorchDispatchMode):
    """The network with all channels, where those that are gone are zero after each call.

    What adds up or takes norms over channels does it over those that are kept.

    Args:
        calls: What it does.
        gone: The entries that are gone.
        prints: Whether to keep sums of what each call gives.
    """

    def __init__(self, calls: Sequence[Call], gone: Tensor, prints: bool) -> None:
        super().__init__()
        self.calls = calls
        self.gone = gone
        self.prints = prints
        self.seen = Seen()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name, number = func.overloadpacket.__name__, self.seen.end
        if number == len(self.calls) or self.calls[number].name != name:
            self.seen.failures[number] = f"another call, {name}"
            raise _Stop
        call = self.calls[number]
        self.seen.end += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        lost = [[a for a in axes if self.gone[a.ids].any()] for axes in call.given]
        outputs = [[a for a in axes if self.gone[a.ids].any()] for axes in call.outputs]
        if name in OVER and any(lost):
            out = self._over_kept(func, name, args, kwargs, given, lost, call, outputs)
        else:
            out = func(*args, **kwargs)
        leaves, spec = tree_flatten(out)
        place, changed = 0, False
        for i, (leaf, before) in enumerate(zip(leaves, call.leaves, strict=False)):
            if isinstance(leaf, torch.ScriptObject):
                continue
            if not isinstance(leaf, Tensor):
                leaves[i], changed = before, True
                continue
            axes = outputs[place] if place < len(outputs) else []
            place += 1
            shares = is_view(leaf, given)
            if isinstance(before, Tensor):
                if leaf.shape == before.shape and not (shares and not name.endswith("_")):
                    leaf.copy_(before)
                elif leaf.shape != before.shape:
                    leaves[i], changed = before.clone(), True
            elif axes and (not shares or name.endswith("_")):
                for axis in axes:
                    leaf.masked_fill_(self.gone[axis.ids].to(leaf.device), 0)
        if self.prints:
            outs = [t for t in leaves if isinstance(t, Tensor)]
            whole = [outputs[i] if i < len(outputs) else [] for i in range(len(outs))]
            self.seen.prints.append([
                print_of(taken(t, axes, self.gone)) for t, axes in zip(outs, whole, strict=True)
            ])
        return tree_unflatten(leaves, spec) if changed else out

    def _over_kept(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Any,
        given: list[Tensor],
        lost: list[list[Axis]],
        call: Call,
        outputs: list[list[Axis]],
    ) -> Any:
        kept = iter([taken(t, axes, self.gone) for t, axes in zip(given, lost, strict=True)])
        args, kwargs = tree_map_only(Tensor, lambda _: next(kept), (args, kwargs))
        sizes = list(args)
        if name in ("native_layer_norm", "_fused_rms_norm"):
            sizes[1] = list(args[0].shape[-len(args[1]) :])
        elif name == "native_group_norm":
            sizes[6] = left_of(call.shapes[1], outputs[1], self.gone)[1]
            sizes[4] = args[0].shape[1]
        leaves, spec = tree_flatten(func(*sizes, **kwargs))
        for place, leaf in enumerate(leaves):
            shape = tuple(call.shapes[place])
            if isinstance(leaf, Tensor) and tuple(leaf.shape) != shape:
                axes = outputs[place] if place < len(outputs) else []
                whole = leaf.new_zeros(shape)
                whole[_keep(shape, axes, self.gone).to(leaf.device)] = leaf.reshape(-1)
                leaves[place] = whole
        return tree_unflatten(leaves, spec)


def look(
    model: nn.Module,
    example_inputs: Any,
    calls: Sequence[Call],
    gone: Tensor,
    *,
    training: bool = False,
    zeroed: bool = False,
    prints: bool = False,
) -> Seen:
    """Run a network and see whether it does what it did.

    Args:
        model: The network.
        example_inputs: What it is called with.
        calls: What it did.
        gone: The entries that are gone.
        training: Whether to call it in training mode.
        zeroed: Whether it has all channels still, to be zero instead of gone.
        prints: Whether to keep sums of what each call gives.

    Returns:
        What was seen.
    """
    mode = (Zeroed if zeroed else Check)(calls, gone, prints)
    seen = mode.seen
    try:
        seen.outputs = tensors_in(run(model, example_inputs, mode, training=training))
    except _Stop:
        return seen
    except MEMORY:
        raise
    except Exception as error:
        seen.error = error
        seen.failures[min(seen.end, len(calls) - 1)] = f"{type(error).__name__}: {error}"
        return seen
    while seen.end < len(calls) and calls[seen.end].name == "clone":
        seen.end += 1
    if seen.end < len(calls):
        seen.failures[seen.end] = f"the code does not call {calls[seen.end].name} then"
    return seen


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two results are too far apart to be a matter of rounding."""
    if one.shape != other.shape:
        return True
    if not one.is_floating_point() or not one.numel():
        return False
    one, other = one.double(), other.double()
    same = (one == other) | ~one.isfinite() | ~other.isfinite()
    off = torch.where(same, 0, one - other).norm()
    size = torch.where(same & ~other.isfinite(), 0, other).norm()
    return bool(off > _TOLERANCE * size + 1e-30)


_TOLERANCE = 1e-2  # of float32 after many layers; what is really wrong is far off


def print_of(tensor: Tensor) -> Tensor:
    """A few sums that tell a tensor from others, in float64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1).double()
    flat = torch.where(flat.isfinite(), flat, 0)
    wave = (
        torch.arange(len(flat), device=flat.device, dtype=torch.float64).mul_(0.7548776662).cos_()
    )
    return torch.stack([flat.norm(), (flat * wave).sum()]).cpu()


def first_other(one: Seen, other: Seen) -> int | None:
    """The number of the first call that gives other values in two looks."""
    for number, (a, b) in enumerate(zip(one.prints, other.prints, strict=False)):
        for x, y in zip(a, b, strict=False):
            size = max(float(x[0]), float(y[0]))
            if bool(((x - y).abs() > _TOLERANCE * size + 1e-30).any()):
                return number
    return None


def taken(tensor: Tensor, axes: list[Axis], gone: Tensor) -> Tensor:
    """What is left of a tensor.

    Args:
        tensor: The tensor.
        axes: Those along which entries are gone.
        gone: The entries that are.

    Returns:
        A copy of the rest, or the tensor itself where it has all.
    """
    if not axes:
        return tensor
    keep = _keep(tensor.shape, axes, gone)
    shape = left_of(tensor.shape, axes, gone)
    return tensor.detach()[keep.to(tensor.device)].view(shape)


def _keep(shape: Sequence[int], axes: list[Axis], gone: Tensor) -> Tensor:
    keep = torch.ones(tuple(shape), dtype=torch.bool)
    for axis in axes:
        keep &= ~gone[axis.ids]
    return keep


def left_of(shape: Sequence[int], axes: list[Axis], gone: Tensor) -> tuple[int, ...]:
    """The shape of what is left of a tensor."""
    sizes = list(shape)
    for axis in axes:
        sizes[axis.dim] = left(axis, gone)
    return tuple(sizes)


def left(axis: Axis, gone: Tensor) -> int:
    """How many entries a row along an axis still has."""
    row = axis.ids.movedim(axis.dim, -1).reshape(-1, axis.ids.size(axis.dim))[0]
    return len(row) - int(gone[row].sum())


def _shaped(call: Call) -> list[tuple[Any, list[Axis]]]:
    return [
        (shape, call.outputs[i] if i < len(call.outputs) else [])
        for i, shape in enumerate(call.shapes)
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
            return f"it is called with {a:.6g} instead of {b:.6g}"
    return "it is called with other numbers"


def _sizes(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(" by ".join(map(str, shape)) or "one number" for shape in shapes)
