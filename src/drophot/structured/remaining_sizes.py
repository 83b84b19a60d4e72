"""What is left of a tensor without some entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drophot.structured.dependency_graph import Axis


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
    keep = keep_mask(tensor.shape, axes, gone)
    shape = left_of(tensor.shape, axes, gone)
    return tensor.detach()[keep.to(tensor.device)].view(shape)


def keep_mask(shape: Sequence[int], axes: list[Axis], gone: Tensor) -> Tensor:
    """Whether an entry of a tensor of this shape is kept."""
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
