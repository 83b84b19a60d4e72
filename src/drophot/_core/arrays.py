"""Numbers that a user gives, as tensors: lists, NumPy's arrays and tensors of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_KINDS = "biuf"  # NumPy's letters for bools, integers and floats
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # can do next to nothing in torch


def numbers(name: str, value: Tensor | ArrayLike) -> Tensor:
    """Real numbers as a tensor of the same values, in a dtype that torch computes in.

    Args:
        name: What the caller calls them.
        value: A tensor, an array or nested lists. A masked number becomes NaN.

    Returns:
        Floats of 32 bits or more, or signed integers or bytes; detached, on the device they are on.

    Raises:
        TypeError: If they are anything but dense real numbers.
    """
    found = value.detach() if isinstance(value, Tensor) else _tensor(name, value)
    plain = found.layout == torch.strided and not (found.is_quantized or found.is_meta)
    if not plain or hasattr(found, "full_tensor"):
        raise TypeError(
            f"`{name}` should be a dense tensor with its data. Found a {type(found).__name__} of "
            f"{found.dtype}, {found.layout}, on {found.device}; give to_dense() of a sparse one, "
            f"dequantize() of a quantised one, full_tensor() of a distributed one."
        )
    if found.is_complex():
        raise TypeError(f"`{name}` should be real numbers. Found {found.dtype}.")
    if found.is_floating_point():
        return found if found.dtype.itemsize >= 4 else found.float()  # exact
    if found.dtype == torch.uint64 and (found.view(torch.int64) < 0).any():
        raise TypeError(f"`{name}` should be below 2⁶³. Found larger ones; give them as float64.")
    return found.long() if found.dtype in (torch.bool, *_UNSIGNED) else found


def integers(name: str, value: Any, wanted: str = "integers", cure: str = "") -> NDArray[np.int64]:
    """Integers as an array.

    Args:
        name: What the caller calls them.
        value: A tensor, an array or nested lists.
        wanted: What they should be.
        cure: What to do about a bool mask.

    Returns:
        Of the same shape, int64. Of nothing, shape `(0,)`.

    Raises:
        TypeError: If they are no integers.
        ValueError: If one is masked, or does not fit in 64 bits.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    found = _array(name, value, wanted)
    if found.size == 0:
        return np.empty(0, np.int64)
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(
            f"`{name}` should be {wanted}. Found {found.dtype}{cure * (found.dtype == bool)}."
        )
    if masked := int(np.ma.count_masked(found)):
        raise ValueError(
            f"`{name}` should be known for every sample. Found {masked} of {found.size} masked; "
            f"leave those samples out."
        )
    if found.dtype == np.uint64 and found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"`{name}` should be below 2⁶³. Found {found.max()}.")
    return np.asarray(found).astype(np.int64)


def _tensor(name: str, value: Any) -> Tensor:
    found = _array(name, value, "real numbers")
    if found.dtype.kind not in _KINDS or found.dtype.itemsize > 8:
        convert = "" if found.dtype.kind in "cVMm" else f"; give {name}.astype(float)"
        raise TypeError(
            f"`{name}` should be real numbers. Found an array of {found.dtype}{convert}."
        )
    if isinstance(found, np.ma.MaskedArray):
        unknown = np.ma.getmaskarray(found)
        found = np.where(unknown, np.nan, found.data) if unknown.any() else found.data
    # torch takes neither reversed views nor another machine's order of bytes, and warns of arrays
    # that are read-only: NumPy copies those alone.
    native = found.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(found, native, requirements=["C", "W"]))


def _array(name: str, value: Any, wanted: str) -> NDArray[Any]:
    """An array of numbers, or a sentence that says what was given instead."""
    method: Callable[..., Any] | None = getattr(value, "scores", None)
    if callable(method):
        raise TypeError(
            f"`{name}` should be {wanted}. Found a {type(value).__name__}; give its `.scores()`."
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
            f"`{name}` should be {wanted}: a tensor, an array or a list. Found a "
            f"{type(value).__name__}{' of ' * bool(kinds)}{', '.join(kinds)} that NumPy cannot "
            f"read as numbers{f'; give torch.cat({name})' * tensors}."
        )
    return found
