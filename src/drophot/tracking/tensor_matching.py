"""Whether a model was called on the tensors of a batch: by identity, memory, values or samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch that was handed out, with the tensors that a forward on it is recognized by."""

    index: Tensor
    targets: Tensor
    tensors: list[Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        """Its tensors without the targets, which do not identify the inputs of a forward."""
        return [t for t in self.tensors if not same_memory(t, self.targets)] or self.tensors


def tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """All tensors in a batch or in the arguments of a model."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part, depth - 1)


def has_memory_of(batch: Batch, inputs: list[Tensor]) -> bool:
    """Whether a model was called on a batch's tensors, or on the same memory."""
    main = _largest(batch, inputs)
    return bool(main) and all(any(same_memory(z, t) for t in batch.inputs) for z in main)


def has_values_of(batch: Batch, inputs: list[Tensor]) -> bool:
    """Whether a model was called on a batch's values, in any shape that keeps the rows."""
    main = _largest(batch, inputs)
    return bool(main) and all(any(_equal(t, z) for t in batch.inputs) for z in main)


def _largest(batch: Batch, inputs: list[Tensor]) -> list[Tensor]:
    """The largest of a model's inputs. Smaller ones, such as masks, may equal another batch's."""
    inputs = [z for z in inputs if not same_memory(z, batch.targets)]
    rows = [z for z in inputs if z.dim() and len(z) == len(batch.index)] or inputs
    most = max((z.numel() * z.element_size() for z in rows), default=0)
    return [z for z in rows if z.numel() * z.element_size() == most]


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same object, or views of all of the same memory."""
    if one is other:
        return True
    if one.device != other.device or one.numel() != other.numel() or not one.numel():
        return False
    try:
        return one.data_ptr() == other.data_ptr() != 0
    except RuntimeError:  # a tensor without memory
        return False


def is_view_of_rows(one: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is a view of some rows of another."""
    return one._base is not None and (one._base is whole or one._base is whole._base)


def equal_pairwise(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of tensors on the CPU have the same values."""
    return len(some) == len(others) and all(map(_equal, some, others))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU have the same values, row by row."""
    if one.device.type != "cpu" or other.device.type != "cpu" or not other.numel():
        return False
    if one.shape != other.shape:
        if one.shape[:1] != other.shape[:1] or one.numel() != other.numel():
            return False
        one, other = one.flatten(1), other.flatten(1)
    try:
        return torch.equal(one.to(other.dtype), other)
    except RuntimeError:  # a layout that cannot be compared
        return False


def probe(tensor: Tensor) -> Tensor:
    """Some values of each row: the middle of at most about thirty columns."""
    if tensor.dim() < 2:
        return tensor
    step = max(1, tensor.shape[1] // 16)
    return tensor[(slice(None), slice(None, None, step), *(n // 2 for n in tensor.shape[2:]))]


def equal_on_device(
    batch: Batch, inputs: list[Tensor], *, inputs_probed: bool = False, batch_probed: bool = False
) -> Tensor | None:
    """Whether inputs on a device have a batch's values at the probed positions.

    Returns a bool on the device, so that the step does not wait, or `None` if nothing can be
    compared.
    `inputs_probed` and `batch_probed` tell that the tensors are probes already.
    """
    for z in inputs:
        if z.device.type == "cpu" or z.dim() == 0:
            continue
        mine = z if inputs_probed else probe(z)
        for tensor in batch.tensors:
            theirs = tensor if batch_probed or tensor.dim() == 0 else probe(tensor)
            if theirs.shape == mine.shape:
                moved = theirs.to(mine.device, non_blocking=True).to(mine.dtype)
                return (moved == mine).all()
    return None
