"""Which entries of which tensors have to be removed together, as seen in one forward pass.

An entry is one index along one dimension of a tensor, such as one channel of an image. Every
dimension of every parameter starts as a row of entries that can be removed. Each operator that
the network calls couples the entries of its inputs and outputs that have to be removed together,
and freezes those that have to be kept. Entries of the network's inputs and outputs are kept. An
operator that is not understood freezes all entries of its inputs, so that the network is pruned
less but never wrongly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

Shape = Sequence[int]
View = tuple[str, tuple[int, ...]]  # the module that a view is called in, and the new shape


class Axis(NamedTuple):
    """A dimension of a tensor whose entries can be removed.

    `ids` numbers the entries. Its shape broadcasts to the tensor's: (1, 64, 1, 1) for the channels
    of an image. Where `ids` varies along other dimensions too, each row along `dim` loses different
    entries, and all rows lose equally many: (12, 1, 64) for the channels of twelve attention heads.
    """

    dim: int
    ids: Tensor

    def rows(self) -> Tensor:
        """The entries of each row along the dimension, `(rows, length)`."""
        length = self.ids.size(self.dim)
        return self.ids.movedim(self.dim, -1).reshape(self.ids.numel() // max(length, 1), length)

    def row(self) -> Tensor:
        """The entries of the first row, or none; the other rows lose equally many."""
        return self.rows()[0] if self.ids.numel() else self.ids.flatten()


class DependencyGraph:
    """The entries of all parameters and buffers, which are coupled, and which are frozen.

    Args:
        model: The network.
        whole_heads: Modules, and the width of the heads in them that are removed only as a whole.
        view_dims: The dimension along which entries are removed where a view splits one dimension
            into several; the last of these by default.
    """

    def __init__(
        self,
        model: nn.Module,
        whole_heads: Collection[tuple[str, int]] = (),
        view_dims: Mapping[View, int] | None = None,
    ) -> None:
        self.whole_heads = whole_heads
        self.view_dims = view_dims or {}
        self.requested_dims: dict[View, int] = {}  # `view_dims` for which operators asked
        self.views: dict[View, Tensor] = {}  # the entries of a dimension that was split
        self.module = ""  # path of the module that the current operator is called in
        self.names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.names[tensor] = name
        self.axes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.num_entries = 0
        self.dimensions: list[Tensor] = []  # the entries of each dimension, `(size,)`
        self.coupled: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[str, Tensor]] = []  # the reason and the entries
        self.balanced: list[Tensor] = []  # (rows, length): each row has to lose equally many
        self.matrix_outputs: list[Tensor] = []  # entries that matrix products produce
        self.group_entries: dict[str, Tensor] = {}  # by a weight's name: one entry of each group
        # Index tensors (an argmax over entries): the entries are frozen if these are used.
        self.indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def axes_of(self, tensor: Any) -> list[Axis]:
        """The axes of a tensor; a parameter that is used for the first time gets new ones."""
        if not isinstance(tensor, Tensor):
            return []
        if tensor in self.indices:
            self.freeze(*self.indices.pop(tensor))
        if tensor in self.names and tensor not in self.axes and tensor.is_floating_point():
            self.axes[tensor] = [
                Axis(dim, self.new_entries(tensor.dim(), dim, size))
                for dim, size in enumerate(tensor.shape)
                if size > 1
            ]
        return self.axes.get(tensor) or []

    def only_axis(self, tensor: Tensor, dim: int, why: str) -> Axis | None:
        """The axis along one dimension; the axes along all other dimensions are frozen."""
        axes = self.axes_of(tensor)
        for axis in axes:
            if axis.dim != dim and not self.request_dim(axis, dim):
                self.freeze([axis], why)
        return next((axis for axis in axes if axis.dim == dim), None)

    def new_entries(self, dims: int, dim: int, size: int) -> Tensor:
        """New entries along dimension `dim` of a tensor with `dims` dimensions."""
        row = torch.arange(self.num_entries, self.num_entries + size, device="cpu")
        self.num_entries += size
        self.dimensions.append(row)
        return along(row, dims, dim)

    def parameter_name(self, weight: Tensor, row: Tensor) -> str | None:
        """The name of the parameter that a weight is, or is computed from.

        `row` has the entries of the weight's dimension 0.
        """
        if weight in self.names:
            return self.names[weight]
        for tensor, name in self.names.items():
            for axis in self.axes.get(tensor) or ():
                if tensor.dim() > 1 and axis.dim == 0 and torch.equal(axis.ids.reshape(-1), row):
                    return name
        return None

    def couple(self, some: Tensor, others: Tensor) -> None:
        """Remove entries only together; both tensors of entries broadcast."""
        some, others = torch.broadcast_tensors(some, others)
        self.coupled.append((some.reshape(-1), others.reshape(-1)))

    def freeze(self, axes: Sequence[Axis], why: str) -> None:
        """Keep all entries of some axes, for a reason that the user will read."""
        self.frozen += [(why, axis.ids.reshape(-1)) for axis in axes]

    def request_dim(self, axis: Axis, dim: int) -> bool:
        """Ask for entries along another dimension of a view, such as the channels of an image.

        A view that splits one dimension into several leaves the entries along the last of them,
        which is `axis`. If `dim` is another of them, the request is noted for the next recording,
        and the result is `True`.
        """
        if axis.dim == dim or axis.ids.size(dim) == 1:
            return False
        first = axis.ids.narrow(dim, 0, 1).reshape(-1).sort().values
        for key, ids in self.views.items():
            for other in range(ids.dim()):
                same = ids.size(other) == axis.ids.size(dim) and ids.numel() == axis.ids.numel()
                if same and torch.equal(ids.narrow(other, 0, 1).reshape(-1).sort().values, first):
                    self.requested_dims[key] = other
                    return True
        return False

    def uniform(self, axis: Axis, dims: Sequence[int]) -> Axis:
        """The axis with its entries coupled along other dimensions, so that `ids` is constant."""
        ids = axis.ids
        for dim in dims:
            if dim != axis.dim and ids.size(dim) > 1:
                first = ids.narrow(dim, 0, 1)
                self.couple(first, ids)
                ids = first
        return Axis(axis.dim, ids)

    def broadcast(
        self, shape: Shape, tensors: Sequence[tuple[Shape, list[Axis]]], why: str
    ) -> list[Axis]:
        """The axes of the result of an elementwise operator on tensors that broadcast."""
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
                self.freeze(found, why)
            elif found:
                for other in found[1:]:
                    self.couple(found[0].ids, other.ids)
                merged.append(max(found, key=lambda axis: axis.ids.numel()))
        return merged

    def matmul(
        self, a: Tensor, b: Tensor, axes_a: list[Axis], axes_b: list[Axis], why: str
    ) -> list[Axis]:
        """The axes of a matrix product, batched or not."""
        dims = a.dim()
        rows, columns = dims - 2, dims - 1
        left = {axis.dim: axis for axis in axes_a}
        right = {axis.dim: axis for axis in axes_b}
        inner_a, inner_b = left.pop(columns, None), right.pop(rows, None)
        if inner_a and inner_b:
            inner_a, inner_b = self.uniform(inner_a, [rows]), self.uniform(inner_b, [columns])
            self.couple(inner_a.ids, inner_b.ids.transpose(rows, columns))
        else:
            self.freeze([axis for axis in (inner_a, inner_b) if axis], why)
        if (out := right.get(columns)) is not None:
            self.matrix_outputs.append(out.ids.reshape(-1))
        left = {dim: self.uniform(axis, [columns]) for dim, axis in left.items()}
        right = {dim: self.uniform(axis, [rows]) for dim, axis in right.items()}
        shape = [*a.shape[:-1], b.shape[-1]]
        batch_a, batch_b = [*a.shape[:-1], 1], [*b.shape[:-2], 1, b.shape[-1]]
        return self.broadcast(
            shape, [(batch_a, list(left.values())), (batch_b, list(right.values()))], why
        )

    def reshape(self, axis: Axis, old: Shape, new: Shape) -> Axis | None:
        """The axis after a reshape; `None`, and frozen, if none of its entries can be removed."""
        blocks = list(_blocks(old, new))
        mine, span = next(block for block in blocks if axis.dim in block[0])
        if len(mine) + len(span) > 2:
            # The dimensions after it keep their order only if they lose the same entries.
            axis = self.uniform(axis, range(axis.dim + 1, mine.stop))
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
            self.freeze([axis], "all of these channels are coupled to each other")
            return None
        if len(varying) > 1 and (self.module, new[varying[-1]]) in self.whole_heads:
            *varying, width = varying
            self.couple(ids.narrow(width, 0, 1), ids)
            ids = ids.narrow(width, 0, 1)
        if len(varying) > 1:
            key = self.module, tuple(new)
            if (dim := self.view_dims.get(key)) in varying:
                return self.uniform(Axis(dim, ids), varying)
            self.views.setdefault(key, ids)
            self.balanced.append(Axis(varying[-1], ids).rows())
        return Axis(varying[-1], ids)


def along(row: Tensor, dims: int, dim: int) -> Tensor:
    """Reshape a row of entries to dimension `dim` of a tensor with `dims` dimensions."""
    return row.reshape([-1 if d == dim else 1 for d in range(dims)])


def _blocks(old: Shape, new: Shape) -> Iterator[tuple[range, range]]:
    """The smallest runs of old and new dimensions that a reshape maps onto each other."""
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
