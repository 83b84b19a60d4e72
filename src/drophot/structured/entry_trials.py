"""Operators that do the same to each entry of a dimension, found by trying them on fewer.

An operator acts on the entries of a dimension alone if, called with some of them, it gives some of
what it gives with all. Pooling does that to channels, an index to all dimensions but the one that
it chooses from, a Fourier transform to all but its own. No list has to say so.
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
from drophot.structured.dependency_graph import Axis, Shape, Ties

_TRIES = 24  # of which tensors' dimensions belong together, for one dimension
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_RANDOM = torch.Tag.nondeterministic_seeded


Owners = tuple[int, Tensor]  # an output's dimension, and whose each of its entries is


@dataclass(frozen=True, slots=True)
class Along:
    """What an operator does along a dimension."""

    dims: dict[int, int]  # of each tensor that has it, by its place among the arguments
    step: int  # so many neighbours go together
    outputs: list[Owners | None]  # of each output; `None` where it has no such dimension


def entries(ties: Ties, where: str, func: Any, args: Any, kwargs: Any) -> list[list[Axis]] | None:
    """The axes of what an operator gives, whatever it is.

    Dimensions along which it mixes entries stay.

    Args:
        ties: What is known so far.
        where: The call, in words.
        func: The operator.
        args: What it was called with.
        kwargs: By name.

    Returns:
        The axes of each output, or `None` where nothing is known of it.
    """
    if _RANDOM in func.tags:
        return None
    trial = _Trial.of(func, args, kwargs)
    if trial is None:
        return None
    given = tree_leaves((args, kwargs))
    axes = {
        place: {axis.dim: axis for axis in ties.of(leaf)}
        for place, leaf in enumerate(given)
        if isinstance(leaf, Tensor)
    }
    found: list[list[Axis]] = [[] for _ in trial.whole]
    known: set[tuple[int, int]] = set()
    for place, own in axes.items():
        for dim, axis in own.items():
            if (place, dim) in known:
                continue
            others = {
                other: [d for d in dims if (other, d) not in known]
                for other, dims in axes.items()
                if other != place
            }
            along = trial.along(place, dim, others)
            if along is None:
                if not any(
                    trial.along(place, other, {}) and ties.turn(axis, other)
                    for other in reversed(range(axis.ids.dim()))
                    if other != dim
                ):
                    ties.fix([axis], where)
                continue
            known |= set(along.dims.items())
            rows = _rows(ties, trial, place, axis, along)
            for other, its_dim in along.dims.items():
                if other != place:
                    its = ties.even(axes[other][its_dim], range(trial.dims(other)))
                    ties.tie(rows.ids.reshape(-1, trial.size(place, dim)), its.ids.reshape(1, -1))
            _put(found, trial, place, rows, along)
    return found


def _rows(ties: Ties, trial: _Trial, place: int, axis: Axis, along: Along) -> Axis:
    """An axis that varies only along dimensions which the operator keeps apart too."""
    alone = len(along.dims) == 1 and along.step == 1
    alike = [n for n, owners in enumerate(along.outputs) if owners is not None]
    for dim in range(axis.ids.dim()):
        if dim != axis.dim and axis.ids.size(dim) > 1:
            row = trial.along(place, dim, {}) if alone else None
            if row is None or row.step > 1 or any(row.outputs[n] is None for n in alike):
                axis = ties.even(axis, [dim])
    if along.step > 1:
        ids = axis.ids.reshape(-1, along.step)
        ties.tie(ids[:, :1], ids)
    return axis


def _put(found: list[list[Axis]], trial: _Trial, place: int, axis: Axis, along: Along) -> None:
    """Add an axis to those of the outputs."""
    for number, owners in enumerate(along.outputs):
        if owners is None:
            continue
        dim, owner = owners
        ids = axis.ids.index_select(axis.dim, owner)
        order, sizes = {dim: axis.dim}, [1] * trial.whole[number].dim()
        sizes[dim] = len(owner)
        for other in range(axis.ids.dim()):
            if other != axis.dim and axis.ids.size(other) > 1:
                row = trial.along(place, other, {})  # it was tried already
                its = row.outputs[number] if row is not None else None
                assert its is not None
                its_dim, its_owner = its
                order[its_dim], sizes[its_dim] = other, len(its_owner)
                ids = ids.index_select(other, its_owner)
        rest = [d for d in range(ids.dim()) if d not in order.values()]
        ids = ids.permute([order[d] for d in sorted(order)] + rest)
        found[number].append(Axis(dim, ids.reshape(sizes)))


class _Trial:
    """An operator, to be called with a part of what it was called with."""

    def __init__(self, func: Any, leaves: list[Any], spec: Any, whole: list[Tensor]) -> None:
        self.func, self.leaves, self.spec, self.whole = func, leaves, spec, whole
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._seen: dict[Any, Along | None] = {}

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any) -> _Trial | None:
        """With other values, so that no two entries are alike; `None` where it cannot be called."""
        leaves, spec = tree_flatten((args, kwargs))
        for change in (_scattered_double, _scattered, lambda leaf, _: _copy(leaf)):
            random = torch.Generator().manual_seed(0)
            own = [change(leaf, random) for leaf in leaves]
            first, again = _call(func, own, spec), _call(func, own, spec)
            if first is not None and again is not None:
                if not first or not all(map(_close, first, again)):
                    return None
                return cls(func, own, spec, first)
        return None

    def size(self, place: int, dim: int) -> int:
        return self.leaves[place].size(dim)

    def dims(self, place: int) -> int:
        return self.leaves[place].dim()

    def along(self, place: int, dim: int, others: dict[int, list[int]]) -> Along | None:
        """What the operator does along a dimension, of one tensor or with those of others."""
        key = place, dim, tuple((other, tuple(dims)) for other, dims in others.items())
        if key not in self._seen:
            self._seen[key] = next(self._ways(place, dim, others), None)
        return self._seen[key]

    def _ways(self, place: int, dim: int, others: dict[int, list[int]]) -> Iterator[Along]:
        size = self.size(place, dim)
        choices = [
            [None, *(d for d in dims if self.size(other, d) == size)]
            for other, dims in others.items()
        ]
        for tries, way in enumerate(product(*choices)):
            if tries == _TRIES:
                return
            dims = {place: dim}
            dims |= {other: d for other, d in zip(others, way, strict=True) if d is not None}
            for step in self._steps(size):
                outputs = self._outputs(dims, size, step)
                if outputs is not None:
                    yield Along(dims, step, outputs)

    def _steps(self, size: int) -> list[int]:
        smaller = {n for out in self.whole for n in out.shape if 1 < n < size and size % n == 0}
        return [1, *sorted(size // n for n in smaller)]

    def _outputs(self, dims: dict[int, int], size: int, step: int) -> list[Owners | None] | None:
        """Whose each entry of the outputs is, if that is so whichever entries are left."""
        random = torch.Generator().manual_seed(size)
        groups = size // step
        order = torch.randperm(groups, generator=random)
        found: list[Owners | None] | None = None
        for some in (order[: (groups + 1) // 2], order[(groups + 1) // 2 :], order[:1]):
            if not 0 < len(some) < groups:
                continue
            kept = torch.zeros(groups, dtype=torch.bool)
            kept[some] = True
            part = self._part(dims, kept.repeat_interleave(step))
            if part is None or len(part) != len(self.whole):
                return None
            owners: list[Owners | None] = []
            for whole, out in zip(self.whole, part, strict=True):
                same = whole.shape == out.shape
                owners.append(None if same else _owner(whole, out, kept, step))
                if owners[-1] is None and not (same and _close(whole, out)):
                    return None
            if found is not None and not all(map(_same, found, owners)):
                return None
            found = owners
        return found if found is not None and any(found) else None

    def _part(self, dims: dict[int, int], kept: Tensor) -> list[Tensor] | None:
        leaves = list(self.leaves)
        for place, dim in dims.items():
            rows = kept.nonzero()[:, 0].to(leaves[place].device)
            leaves[place] = leaves[place].index_select(dim, rows)
        return _call(self.func, leaves, self.spec)


def _same(one: Owners | None, other: Owners | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] == other[0] and torch.equal(one[1], other[1])


def _owner(whole: Tensor, part: Tensor, kept: Tensor, step: int) -> Owners | None:
    """The dimension of an output that got smaller, and whose its entries were."""
    dim = _smaller(whole.shape, part.shape)
    if dim is None:
        return None
    groups, size = len(kept), whole.size(dim)
    if size % groups:
        return None
    first = torch.arange(groups) * step
    for owner in (first.repeat_interleave(size // groups), first.repeat(size // groups)):
        rows = kept[owner // step].nonzero()[:, 0].to(whole.device)
        if len(rows) == part.size(dim) and _close(whole.index_select(dim, rows), part):
            return dim, owner
    return None


def _smaller(whole: Shape, part: Shape) -> int | None:
    other = [d for d, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b]
    return other[0] if len(whole) == len(part) and len(other) == 1 else None


def _call(func: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> list[Tensor] | None:
    """What an operator gives for copies, or `None` where it cannot."""
    args, kwargs = tree_unflatten([_copy(leaf) for leaf in leaves], spec)
    try:
        outs = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
        return [out.clone() for out in outs if out.layout == torch.strided]
    except Exception as error:  # not in this shape, or not of these numbers
        if must_propagate(error):
            raise
        return None


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _scattered(leaf: Any, random: torch.Generator) -> Any:
    """A tensor of floats with values of its own, of the same signs and about the same sizes."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return _copy(leaf)
    if not leaf.is_floating_point() and not leaf.is_complex():
        return _copy(leaf)
    noise = torch.rand(leaf.shape, generator=random, dtype=torch.float64).add_(0.5)
    noise = noise.to(leaf.device, leaf.dtype)
    return torch.where(leaf == 0, noise, leaf.detach() * noise)


def _scattered_double(leaf: Any, random: torch.Generator) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        leaf = leaf.detach().double()
    return _scattered(leaf, random)


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    tolerance = _TOLERANCE.get(one.dtype, 1e-9 if one.dtype == torch.complex128 else 1e-2)
    finite = one.abs()[one.isfinite()]
    size = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * size, equal_nan=True)
