"""Conversion of user input (lists, NumPy arrays, tensors) to tensors and integer arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

IntArray = NDArray[np.int64]

_KINDS = "biuf"  # NumPy's letters for bools, integers and floats
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch has few operations for these


def as_real_tensor(name: str, value: Tensor | ArrayLike) -> Tensor:
    """Real numbers as a detached tensor, on their device, in a dtype that torch computes in.

    Values stay exact: floats have 32 bits or more, integers are signed or bytes, and masked entries
    become NaN. Raises TypeError for anything but dense real numbers.
    """
    found = value.detach() if isinstance(value, Tensor) else _tensor(name, value)
    plain = found.layout == torch.strided and not (found.is_quantized or found.is_meta)
    if not plain or hasattr(found, "full_tensor"):
        raise TypeError(
            f"`{name}` must be a dense tensor that holds its data, got a {type(found).__name__} of "
            f"{found.dtype} and {found.layout} on {found.device}. Call to_dense() on a sparse "
            f"tensor, dequantize() on a quantized one, full_tensor() on a distributed one."
        )
    if found.is_complex():
        raise TypeError(f"`{name}` must hold real numbers, got {found.dtype}.")
    if found.is_floating_point():
        return found if found.dtype.itemsize >= 4 else found.float()  # exact
    if found.dtype == torch.uint64 and (found.view(torch.int64) < 0).any():
        raise TypeError(f"`{name}` must be below 2⁶³, got larger values. Pass them as float64.")
    return found.long() if found.dtype in (torch.bool, *_UNSIGNED) else found


def as_integers(name: str, value: Any, kind: str = "integers", hint: str = "") -> IntArray:
    """Integers as an int64 array of the same shape; `(0,)` if `value` is empty.

    Args:
        name: The argument's name.
        value: A tensor, an array or nested lists.
        kind: What the values are, for the error.
        hint: Added to the error for a boolean mask.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    found = _array(name, value, kind)
    if found.size == 0:
        return np.empty(0, np.int64)
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(
            f"`{name}` must be {kind}, got {found.dtype}.{hint * (found.dtype == bool)}"
        )
    if masked := int(np.ma.count_masked(found)):
        raise ValueError(
            f"`{name}` must be known for every sample, but {masked} of {found.size} entries are "
            f"masked. Remove those samples first."
        )
    if found.dtype == np.uint64 and found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"`{name}` must be below 2⁶³, got {found.max()}.")
    return np.asarray(found).astype(np.int64)


def as_indices(name: str, value: Any, total: int) -> IntArray:
    """Distinct indices in `[0, total)` as int64 `(K,)`, in the given order; K may be 0."""
    found = as_integers(
        name, value, "integer sample indices", f" Pass {name}.nonzero()[:, 0] for a mask."
    )
    outside = (found < 0) | (found >= total)
    if found.ndim != 1 or outside.any():
        wrong = found.flat[np.argmax(outside)]
        raise ValueError(
            f"`{name}` must be one-dimensional with indices in [0, {total}), got {wrong} in an "
            f"array of shape {found.shape}."
        )
    if repeated := len(found) - len(np.unique(found)):
        raise ValueError(
            f"`{name}` must hold each index once, got {repeated} repeated. Pass {name}.unique()."
        )
    return found


def _tensor(name: str, value: Any) -> Tensor:
    found = _array(name, value, "real numbers")
    if found.dtype.kind not in _KINDS or found.dtype.itemsize > 8:
        hint = "" if found.dtype.kind in "cVMm" else f" Pass {name}.astype(float)."
        raise TypeError(f"`{name}` must be real numbers, got an array of {found.dtype}.{hint}")
    if isinstance(found, np.ma.MaskedArray):
        unknown = np.ma.getmaskarray(found)
        found = np.where(unknown, np.nan, found.data) if unknown.any() else found.data
    # torch accepts neither reversed views nor foreign byte order and warns about read-only arrays;
    # NumPy copies only those.
    native = found.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(found, native, requirements=["C", "W"]))


def _array(name: str, value: Any, kind: str) -> NDArray[Any]:
    method: Callable[..., Any] | None = getattr(value, "scores", None)
    if callable(method):
        raise TypeError(
            f"`{name}` must be {kind}, got a {type(value).__name__}. Pass its `.scores()`."
        )
    try:
        found = np.asanyarray(value)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or (found.dtype == object and not isinstance(value, np.ndarray)):
        items = value if isinstance(value, list | tuple) else ()
        kinds = sorted({type(item).__name__ for item in items})[:4]
        tensors = any(isinstance(item, Tensor) for item in items)
        raise TypeError(
            f"`{name}` must be {kind} in a tensor, an array or a list, got a "
            f"{type(value).__name__}{' of ' * bool(kinds)}{', '.join(kinds)} that NumPy cannot "
            f"convert.{f' Pass torch.cat({name}).' * tensors}"
        )
    return found
