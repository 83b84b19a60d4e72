"""Integers in the order of floats: the keys by which weights are ranked without a GPU."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drophot._core.block_threads import BLOCK

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class FloatKeys:
    """The keys of all elements of a tensor, indexed like a flat array and computed when indexed.

    They are integers in the order of the magnitudes, the bits without the sign, or in the order of
    the signed values. Nothing is copied but the parts that are indexed. A tensor on a GPU is copied
    to the CPU part by part.

    Args:
        values: Floats of 16 bits or more.
        dtype: The dtype in which they are compared, by default their own.
        earlier: The mask of an earlier pruning. Zeros that it removed have the `removed_key`.
        signed: Compare the values with their signs, instead of by magnitude.
    """

    def __init__(
        self,
        values: Tensor,
        *,
        dtype: torch.dtype | None = None,
        earlier: Tensor | None = None,
        signed: bool = False,
    ) -> None:
        self._stored, self._dtype = values.dtype, dtype or values.dtype
        self._bits = _indexable(values.detach().view(INTEGERS[values.dtype.itemsize]))
        self._earlier = None if earlier is None else _indexable(earlier.detach())
        self._signed = signed
        self._length = values.numel()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice | NDArray[np.int64]) -> NDArray[Any]:
        bits = _part(self._bits, where)
        if self._dtype != self._stored:
            floats = torch.from_numpy(bits).view(self._stored).to(self._dtype)
            bits = floats.view(INTEGERS[self._dtype.itemsize]).numpy()
        most = np.iinfo(bits.dtype).max
        keys = bits ^ (bits >> (8 * bits.itemsize - 1)) & most if self._signed else bits & most
        if self._signed:
            keys += keys == -1  # the key of -0 becomes that of 0
        if self._earlier is not None:
            removed = ~_part(self._earlier, where) & (keys == 0)
            keys[removed] = removed_key(self._dtype, signed=self._signed)
        return keys


def removed_key(dtype: torch.dtype, *, signed: bool) -> int:
    """The key of a weight that an earlier pruning removed: below that of every finite float."""
    return torch.iinfo(INTEGERS[dtype.itemsize]).min if signed else -1


def infinite_key(dtype: torch.dtype) -> int:
    """The key of the magnitude of infinity; that of NaN is larger."""
    return int(torch.tensor(torch.inf, dtype=dtype, device="cpu").view(INTEGERS[dtype.itemsize]))


def _indexable(values: Tensor) -> NDArray[Any] | Tensor:
    """A flat view, or an array in which consecutive elements can be read without a copy of all."""
    if values.device.type != "cpu":
        return values.reshape(-1)
    if values.is_contiguous() or prod(values.shape[1:]) > BLOCK:
        return values.reshape(-1).numpy()
    return values.numpy()


def _part(values: NDArray[Any] | Tensor, where: slice | NDArray[np.int64]) -> NDArray[Any]:
    if isinstance(values, Tensor):
        index = where if isinstance(where, slice) else torch.from_numpy(where)
        return values[index].cpu().numpy()
    if values.ndim == 1:
        return values[where]
    if isinstance(where, slice):
        start, stop, _ = where.indices(values.size)
        row = prod(values.shape[1:])
        first = start // row
        rows = values[first : -(-stop // row)].reshape(-1)
        return rows[start - first * row : stop - first * row]
    return values[np.unravel_index(where, values.shape)]
