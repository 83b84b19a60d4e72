"""Finds what an operator without a rule couples, by calling it with fewer entries.

An operator treats the entries of a dimension alike and independently if, called with some of them,
it returns the same part of what it returns with all of them. Pooling does that along channels, an
index along all dimensions but the one that it selects from, a Fourier transform along all
dimensions but its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from drophot._core.interruptions import must_propagate
from drophot.structured.dependency_graph import Axis, Shape
from drophot.structured.operator_call import OperatorCall

_TRIES = 24  # combinations of other tensors' dimensions that are tried with one dimension
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_RANDOM = torch.Tag.nondeterministic_seeded

# A dimension of an output, and for each of its entries the input entry that it belongs to.
Origin = tuple[int, Tensor]


@dataclass(frozen=True, slots=True)
class Independence:
    """Dimensions along which an operator treats entries independently."""

    dims: dict[int, int]  # the dimension of each tensor, by the tensor's position
    step: int  # this many neighbors belong together
    outputs: list[Origin | None]  # of each output; `None` if it has no such dimension


def axes_by_trial(call: OperatorCall, func: Any, args: Any, kwargs: Any) -> list[list[Axis]] | None:
    """The axes of the outputs of any operator, or `None` if it cannot be tried.

    Dimensions whose entries it mixes are frozen.
    """
    graph = call.graph
    if _RANDOM in func.tags:
        return None
    trial = _Trial.of(func, args, kwargs)
    if trial is None:
        return None
    given = tree_leaves((args, kwargs))
    axes = {
        position: {axis.dim: axis for axis in graph.axes_of(leaf)}
        for position, leaf in enumerate(given)
        if isinstance(leaf, Tensor)
    }
    found: list[list[Axis]] = [[] for _ in trial.whole]
    known: set[tuple[int, int]] = set()
    for position, own in axes.items():
        for dim, axis in own.items():
            if (position, dim) in known:
                continue
            others = {
                other: [d for d in dims if (other, d) not in known]
                for other, dims in axes.items()
                if other != position
            }
            alike = trial.independence(position, dim, others)
            if alike is None:
                if not any(
                    trial.independence(position, other, {}) and graph.request_dim(axis, other)
                    for other in reversed(range(axis.ids.dim()))
                    if other != dim
                ):
                    graph.freeze([axis], call.reason)
                continue
            known |= set(alike.dims.items())
            rows = _independent_rows(call, trial, position, axis, alike)
            for other, its_dim in alike.dims.items():
                if other != position:
                    its = graph.uniform(axes[other][its_dim], range(trial.dims(other)))
                    graph.couple(
                        rows.ids.reshape(-1, trial.size(position, dim)), its.ids.reshape(1, -1)
                    )
            _put(found, trial, position, rows, alike)
    return found


def _independent_rows(
    call: OperatorCall, trial: _Trial, position: int, axis: Axis, alike: Independence
) -> Axis:
    """The axis, varying only along dimensions that the operator also treats independently."""
    alone = len(alike.dims) == 1 and alike.step == 1
    varying = [n for n, origin in enumerate(alike.outputs) if origin is not None]
    for dim in range(axis.ids.dim()):
        if dim != axis.dim and axis.ids.size(dim) > 1:
            row = trial.independence(position, dim, {}) if alone else None
            if row is None or row.step > 1 or any(row.outputs[n] is None for n in varying):
                axis = call.graph.uniform(axis, [dim])
    if alike.step > 1:
        ids = axis.ids.reshape(-1, alike.step)
        call.graph.couple(ids[:, :1], ids)
    return axis


def _put(
    found: list[list[Axis]], trial: _Trial, position: int, axis: Axis, alike: Independence
) -> None:
    """Add an axis to those of the outputs."""
    for number, origin in enumerate(alike.outputs):
        if origin is None:
            continue
        dim, source = origin
        ids = axis.ids.index_select(axis.dim, source)
        order, sizes = {dim: axis.dim}, [1] * trial.whole[number].dim()
        sizes[dim] = len(source)
        for other in range(axis.ids.dim()):
            if other != axis.dim and axis.ids.size(other) > 1:
                row = trial.independence(position, other, {})  # known from `_independent_rows`
                its = row.outputs[number] if row is not None else None
                assert its is not None
                its_dim, its_source = its
                order[its_dim], sizes[its_dim] = other, len(its_source)
                ids = ids.index_select(other, its_source)
        rest = [d for d in range(ids.dim()) if d not in order.values()]
        ids = ids.permute([order[d] for d in sorted(order)] + rest)
        found[number].append(Axis(dim, ids.reshape(sizes)))


class _Trial:
    """An operator that is called with parts of its arguments."""

    def __init__(self, func: Any, leaves: list[Any], spec: Any, whole: list[Tensor]) -> None:
        self.func, self.leaves, self.spec, self.whole = func, leaves, spec, whole
        self._results: dict[Any, Independence | None] = {}

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any) -> _Trial | None:
        """Use random values, so that no two entries are equal; `None` if it cannot be called."""
        leaves, spec = tree_flatten((args, kwargs))
        for change in (_randomised_double, _randomised, lambda leaf, _: _copy(leaf)):
            random = torch.Generator().manual_seed(0)
            own = [change(leaf, random) for leaf in leaves]
            first, again = _call(func, own, spec), _call(func, own, spec)
            if first is not None and again is not None:
                if not first or not all(map(_close, first, again)):
                    return None
                return cls(func, own, spec, first)
        return None

    def size(self, position: int, dim: int) -> int:
        return self.leaves[position].size(dim)

    def dims(self, position: int) -> int:
        return self.leaves[position].dim()

    def independence(
        self, position: int, dim: int, others: dict[int, list[int]]
    ) -> Independence | None:
        """Whether the operator treats a dimension independently, alone or with those of others."""
        key = position, dim, tuple((other, tuple(dims)) for other, dims in others.items())
        if key not in self._results:
            self._results[key] = next(self._combinations(position, dim, others), None)
        return self._results[key]

    def _combinations(
        self, position: int, dim: int, others: dict[int, list[int]]
    ) -> Iterator[Independence]:
        size = self.size(position, dim)
        choices = [
            [None, *(d for d in dims if self.size(other, d) == size)]
            for other, dims in others.items()
        ]
        for tries, combination in enumerate(product(*choices)):
            if tries == _TRIES:
                return
            dims = {position: dim}
            dims |= {
                other: d for other, d in zip(others, combination, strict=True) if d is not None
            }
            for step in self._steps(size):
                outputs = self._origins(dims, size, step)
                if outputs is not None:
                    yield Independence(dims, step, outputs)

    def _steps(self, size: int) -> list[int]:
        smaller = {n for out in self.whole for n in out.shape if 1 < n < size and size % n == 0}
        return [1, *sorted(size // n for n in smaller)]

    def _origins(self, dims: dict[int, int], size: int, step: int) -> list[Origin | None] | None:
        """The origins of the outputs' entries, if these are the same whichever entries are kept."""
        random = torch.Generator().manual_seed(size)
        groups = size // step
        order = torch.randperm(groups, generator=random, device="cpu")
        found: list[Origin | None] | None = None
        for some in (order[: (groups + 1) // 2], order[(groups + 1) // 2 :], order[:1]):
            if not 0 < len(some) < groups:
                continue
            keep_mask = torch.zeros(groups, dtype=torch.bool, device="cpu")
            keep_mask[some] = True
            part = self._part(dims, keep_mask.repeat_interleave(step))
            if part is None or len(part) != len(self.whole):
                return None
            origins: list[Origin | None] = []
            for whole, out in zip(self.whole, part, strict=True):
                same = whole.shape == out.shape
                origins.append(None if same else _origin(whole, out, keep_mask, step))
                if origins[-1] is None and not (same and _close(whole, out)):
                    return None
            if found is not None and not all(map(_same, found, origins)):
                return None
            found = origins
        return found if found is not None and any(found) else None

    def _part(self, dims: dict[int, int], keep_mask: Tensor) -> list[Tensor] | None:
        leaves = list(self.leaves)
        for position, dim in dims.items():
            rows = keep_mask.nonzero()[:, 0].to(leaves[position].device)
            leaves[position] = leaves[position].index_select(dim, rows)
        return _call(self.func, leaves, self.spec)


def _same(one: Origin | None, other: Origin | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] == other[0] and torch.equal(one[1], other[1])


def _origin(whole: Tensor, part: Tensor, keep_mask: Tensor, step: int) -> Origin | None:
    """The dimension of an output that got smaller, and the origins of its entries."""
    dim = _shrunk_dim(whole.shape, part.shape)
    if dim is None:
        return None
    groups, size = len(keep_mask), whole.size(dim)
    if size % groups:
        return None
    first = torch.arange(groups, device="cpu") * step
    for source in (first.repeat_interleave(size // groups), first.repeat(size // groups)):
        rows = keep_mask[source // step].nonzero()[:, 0].to(whole.device)
        if len(rows) == part.size(dim) and _close(whole.index_select(dim, rows), part):
            return dim, source
    return None


def _shrunk_dim(whole: Shape, part: Shape) -> int | None:
    other = [d for d, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b]
    return other[0] if len(whole) == len(part) and len(other) == 1 else None


def _call(func: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> list[Tensor] | None:
    """The outputs of an operator for copies of its arguments, or `None` if it raises an error."""
    args, kwargs = tree_unflatten([_copy(leaf) for leaf in leaves], spec)
    try:
        outs = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
        return [out.clone() for out in outs if out.layout == torch.strided]
    except Exception as error:  # this shape or these values are not allowed
        if must_propagate(error):
            raise
        return None


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _randomised(leaf: Any, random: torch.Generator) -> Any:
    """A tensor with other values of the same signs and about the same sizes."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return _copy(leaf)
    if not leaf.is_floating_point() and not leaf.is_complex():
        return _copy(leaf)
    noise = torch.rand(leaf.shape, generator=random, dtype=torch.float64, device="cpu").add_(0.5)
    noise = noise.to(leaf.device, leaf.dtype)
    return torch.where(leaf == 0, noise, leaf.detach() * noise)


def _randomised_double(leaf: Any, random: torch.Generator) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        leaf = leaf.detach().double()
    return _randomised(leaf, random)


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    tolerance = _TOLERANCE.get(one.dtype, 1e-9 if one.dtype == torch.complex128 else 1e-2)
    finite = one.abs()[one.isfinite()]
    size = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * size, equal_nan=True)
