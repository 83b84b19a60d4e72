"""Which entries of which tensors have to go together, seen from one forward pass.

Every dimension of every parameter starts as a row of entries that may go. Each operator that the
network calls ties the entries of its inputs and outputs that cannot go without each other, and
fixes those that have to stay. What it is given and what it gives out stays. An operator that is
not known here fixes all that it meets: the network is then pruned less, never wrongly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

Shape = Sequence[int]
View = tuple[str, tuple[int, ...]]  # the module that it is called in, and its shape


class Axis(NamedTuple):
    """A dimension of a tensor whose entries may go.

    `ids` names each entry. Its shape broadcasts to the tensor's: (1, 64, 1, 1) for the channels of
    an image. Where it varies along other dimensions too, each of their rows loses entries of its
    own, and all rows equally many: (12, 1, 64) for the channels of twelve attention heads.
    """

    dim: int
    ids: Tensor


class Ties:
    """What a forward pass says about the entries of all parameters and buffers.

    Args:
        model: The network.
        whole_heads: Modules, and the width of heads in them that go as a whole or not at all.
        turned: Which dimension entries go along where a view makes several of one, if not the last.
    """

    def __init__(
        self,
        model: nn.Module,
        whole_heads: Collection[tuple[str, int]] = (),
        turned: Mapping[View, int] | None = None,
    ) -> None:
        self.whole_heads = whole_heads
        self.turned = turned or {}
        self.asked: dict[View, int] = {}  # what should be turned
        self.views: dict[View, Tensor] = {}  # what is left of one dimension, as several
        self.path = ""  # of the module that an operator is called in
        self.names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.names[tensor] = name
        self.axes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.count = 0  # of entries
        self.rows: list[Tensor] = []  # of each parameter's dimensions: (size,)
        self.same: list[tuple[Tensor, Tensor]] = []
        self.fixed: list[tuple[str, Tensor]] = []  # why, and which
        self.level: list[Tensor] = []  # (rows, length): each row is to lose equally many
        self.parts: list[Tensor] = []  # each is to lose a share of its own
        self.columns: list[Tensor] = []  # what matrices make
        self.groups: dict[str, Tensor] = {}  # by the name of a weight: one entry of each group
        # Tensors of places among entries, which should then stay if these are used, and why.
        self.places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, tensor: Any) -> list[Axis]:
        """The axes of a tensor; a parameter that is met for the first time gets its own."""
        if not isinstance(tensor, Tensor):
            return []
        if tensor in self.places:
            self.fix(*self.places.pop(tensor))
        if tensor in self.names and tensor not in self.axes and tensor.is_floating_point():
            self.axes[tensor] = [
                Axis(dim, self.new(tensor.dim(), dim, size))
                for dim, size in enumerate(tensor.shape)
                if size > 1
            ]
        return self.axes.get(tensor) or []

    def at(self, tensor: Tensor, dim: int, why: str) -> Axis | None:
        """The axis along one dimension; what there is along others stays."""
        axes = self.of(tensor)
        for axis in axes:
            if axis.dim != dim and not self.turn(axis, dim):
                self.fix([axis], why)
        return next((axis for axis in axes if axis.dim == dim), None)

    def new(self, dims: int, dim: int, size: int) -> Tensor:
        """Entries that nothing is known of yet, along one of so many dimensions."""
        row = torch.arange(self.count, self.count + size)
        self.count += size
        self.rows.append(row)
        return along(row, dims, dim)

    def source(self, weight: Tensor, row: Tensor) -> str | None:
        """The parameter that a weight is, or is computed from, whose first entries are these."""
        if weight in self.names:
            return self.names[weight]
        for tensor, name in self.names.items():
            for axis in self.axes.get(tensor) or ():
                if tensor.dim() > 1 and axis.dim == 0 and torch.equal(axis.ids.reshape(-1), row):
                    return name
        return None

    def tie(self, some: Tensor, others: Tensor) -> None:
        """Let entries go together only."""
        some, others = torch.broadcast_tensors(some, others)
        self.same.append((some.reshape(-1), others.reshape(-1)))

    def fix(self, axes: Sequence[Axis], why: str) -> None:
        """Let entries stay."""
        self.fixed += [(why, axis.ids.reshape(-1)) for axis in axes]

    def turn(self, axis: Axis, dim: int) -> bool:
        """Ask for another dimension of what a view made of one, as of channels before an image.

        Args:
            axis: Along the last of them, which was taken.
            dim: Along which it should have been.

        Returns:
            Whether that is possible; then the network has to be looked at once more.
        """
        if axis.dim == dim or axis.ids.size(dim) == 1:
            return False
        first = axis.ids.narrow(dim, 0, 1).reshape(-1).sort().values
        for key, ids in self.views.items():
            for other in range(ids.dim()):
                same = ids.size(other) == axis.ids.size(dim) and ids.numel() == axis.ids.numel()
                if same and torch.equal(ids.narrow(other, 0, 1).reshape(-1).sort().values, first):
                    self.asked[key] = other
                    return True
        return False

    def even(self, axis: Axis, dims: Sequence[int]) -> Axis:
        """An axis whose entries are the same in all rows along other dimensions."""
        ids = axis.ids
        for dim in dims:
            if dim != axis.dim and ids.size(dim) > 1:
                first = ids.narrow(dim, 0, 1)
                self.tie(first, ids)
                ids = first
        return Axis(axis.dim, ids)

    def merge(self, shape: Shape, tensors: Sequence[tuple[Shape, list[Axis]]], why: str):
        """The axes of what elementwise work on broadcast tensors gives."""
        merged = []
        for dim, size in enumerate(shape):
            found, plain = [], False
            for own, axes in tensors:
                shift = len(shape) - len(own)
                if dim < shift or own[dim - shift] == 1 < size:
                    continue
                axis = next((a for a in axes if a.dim == dim - shift), None)
                if axis is None:
                    plain = True
                else:
                    found.append(Axis(dim, axis.ids[(None,) * shift]))
            if plain:
                self.fix(found, why)
            elif found:
                for other in found[1:]:
                    self.tie(found[0].ids, other.ids)
                merged.append(max(found, key=lambda axis: axis.ids.numel()))
        return merged

    def product(self, a: Tensor, b: Tensor, axes_a: list[Axis], axes_b: list[Axis], why: str):
        """The axes of a matrix product, of batches or not."""
        dims = a.dim()
        rows, columns = dims - 2, dims - 1
        left = {axis.dim: axis for axis in axes_a}
        right = {axis.dim: axis for axis in axes_b}
        inner_a, inner_b = left.pop(columns, None), right.pop(rows, None)
        if inner_a and inner_b:
            inner_a, inner_b = self.even(inner_a, [rows]), self.even(inner_b, [columns])
            self.tie(inner_a.ids, inner_b.ids.transpose(rows, columns))
        else:
            self.fix([axis for axis in (inner_a, inner_b) if axis], why)
        if (out := right.get(columns)) is not None:
            self.columns.append(out.ids.reshape(-1))
        left = {dim: self.even(axis, [columns]) for dim, axis in left.items()}
        right = {dim: self.even(axis, [rows]) for dim, axis in right.items()}
        shape = [*a.shape[:-1], b.shape[-1]]
        batch_a, batch_b = [*a.shape[:-1], 1], [*b.shape[:-2], 1, b.shape[-1]]
        return self.merge(
            shape, [(batch_a, list(left.values())), (batch_b, list(right.values()))], why
        )

    def view(self, axis: Axis, old: Shape, new: Shape) -> Axis | None:
        """An axis after its tensor took another shape."""
        blocks = list(_blocks(old, new))
        mine, span = next(block for block in blocks if axis.dim in block[0])
        if len(mine) + len(span) > 2:
            axis = self.even(axis, range(axis.dim + 1, mine.stop))  # the others keep their order
        ids, sizes, shape = axis.ids, list(axis.ids.shape), [1] * len(new)
        for olds, news in blocks:
            if any(ids.size(dim) > 1 for dim in olds):
                sizes[olds.start : olds.stop] = old[olds.start : olds.stop]
                shape[news.start : news.stop] = new[news.start : news.stop]
        ids = ids.expand(sizes).reshape(shape)
        for dim in span:
            if ids.size(dim) > 1 and bool((ids == ids.narrow(dim, 0, 1)).all()):
                ids = ids.narrow(dim, 0, 1)
        varying = [dim for dim in span if ids.size(dim) > 1]
        if not varying:
            self.fix([axis], "all of these channels are tied to each other")
            return None
        if len(varying) > 1 and (self.path, new[varying[-1]]) in self.whole_heads:
            *varying, width = varying
            self.tie(ids.narrow(width, 0, 1), ids)
            ids = ids.narrow(width, 0, 1)
        if len(varying) > 1:
            key = self.path, tuple(new)
            if (dim := self.turned.get(key)) in varying:
                return self.even(Axis(dim, ids), varying)
            self.views.setdefault(key, ids)
            self.level.append(ids.movedim(varying[-1], -1).reshape(-1, ids.size(varying[-1])))
        return Axis(varying[-1], ids)


def along(row: Tensor, dims: int, dim: int) -> Tensor:
    """A row of entries as one of so many dimensions."""
    return row.reshape([-1 if d == dim else 1 for d in range(dims)])


def _blocks(old: Shape, new: Shape) -> Iterator[tuple[range, range]]:
    """The runs of dimensions that a change of shape turns into each other."""
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        p = q = 1
        if i < len(old):
            p, i = old[i], i + 1
        if j < len(new):
            q, j = new[j], j + 1
        while p != q:
            if p < q:
                p, i = p * old[i], i + 1
            else:
                q, j = q * new[j], j + 1
        yield range(start, i), range(begin, j)
