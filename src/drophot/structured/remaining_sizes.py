"""The part of a tensor that is kept when entries are removed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drophot.structured.dependency_graph import Axis


def kept_part(tensor: Tensor, axes: list[Axis], removed: Tensor) -> Tensor:
    """A copy of a tensor without the removed entries, or the tensor itself if `axes` is empty."""
    if not axes:
        return tensor
    mask = keep_mask(tensor.shape, axes, removed)
    shape = kept_shape(tensor.shape, axes, removed)
    return tensor.detach()[mask.to(tensor.device)].view(shape)


def keep_mask(shape: Sequence[int], axes: list[Axis], removed: Tensor) -> Tensor:
    """Whether each element of a tensor of this shape is kept."""
    keep = torch.ones(tuple(shape), dtype=torch.bool, device="cpu")
    for axis in axes:
        keep &= ~removed[axis.ids]
    return keep


def kept_shape(shape: Sequence[int], axes: list[Axis], removed: Tensor) -> tuple[int, ...]:
    """The shape of a tensor without the removed entries."""
    sizes = list(shape)
    for axis in axes:
        sizes[axis.dim] = remaining_size(axis, removed)
    return tuple(sizes)


def remaining_size(axis: Axis, removed: Tensor) -> int:
    """How many entries a row along an axis keeps."""
    return axis.ids.size(axis.dim) - int(removed[axis.row()].sum())
