"""A user's number, turned once into a plain `float` or `int` that everything after it uses."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch


def real(name: str, value: Any, kind: str = "a number") -> float:
    """A real number as a plain float.

    Args:
        name: What the caller calls it.
        value: A number of Python or NumPy, a tensor without dimensions, a fraction or a decimal.
        kind: What it should be, for the error.

    Returns:
        Its value.

    Raises:
        TypeError: If it is not a number; a bool and a string are none.
        ValueError: If it is NaN, or too large for a float.
    """
    try:
        found = _as_float(value)
    except OverflowError:
        raise ValueError(f"`{name}` should be {kind}. Found {value}.") from None
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` should be {kind}. Found {_shown(value, float)}.") from None
    if math.isnan(found):
        raise ValueError(f"`{name}` should be {kind}. Found nan.")
    return found


def share(name: str, value: Any, interval: str) -> float:
    """A ratio as a plain float, whose range the caller looks at.

    Args:
        name: What the caller calls it.
        value: As in `real`.
        interval: Where it should be, for the error.

    Returns:
        Its value, perhaps NaN.

    Raises:
        TypeError: If it is not a number.
    """
    try:
        return _as_float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        pass
    kind, found = type(value).__name__, _shown(value, float)
    if not found.startswith(kind):
        found = f"{kind} {found.replace(f', a {kind}', '')}"
    raise TypeError(f"`{name}` should be a number in {interval}. Found {found}.")


def integer(name: str, value: Any, *, least: int | None = None) -> int:
    """An integer as a plain int.

    Args:
        name: What the caller calls it.
        value: An integer of Python or NumPy, or a tensor without dimensions that holds one.
        least: The least that it may be.

    Returns:
        Its value.

    Raises:
        TypeError: If it is not an integer; a bool, a string and 2.0 are none.
        ValueError: If it is less than `least`.
    """
    plain = _plain(value)
    try:
        if isinstance(plain, bool):
            raise TypeError
        found = operator.index(plain)
    except TypeError:
        raise TypeError(f"`{name}` should be an integer. Found {_shown(value, int)}.") from None
    if least is not None and found < least:
        raise ValueError(f"`{name}` should be at least {least}. Found {found}.")
    return found


def _as_float(value: Any) -> float:
    plain = _plain(value)
    if isinstance(plain, bool | str | bytes | bytearray | complex):  # float() takes some of it
        raise TypeError
    return float(plain)


def _plain(value: Any) -> Any:
    """What a scalar of NumPy or torch holds; anything else as it is, an array never a number."""
    if not isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value
    if value.shape != () or (isinstance(value, torch.Tensor) and value.is_meta):
        return None
    return value.item()


def _shown(value: Any, to: type[float] | type[int]) -> str:
    """What was given, and how to give it instead."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray) and value.shape != ():
        return f"{kind} of shape {tuple(value.shape)}; pass one number"
    if isinstance(value, str | bytes):
        try:
            return f"{value!r}, a {kind}; pass {to(value)}"
        except ValueError:
            return f"{value!r}, a {kind}"
    plain = _plain(value)
    if to is int and isinstance(plain, float) and math.isfinite(plain):
        fix = f"pass {int(plain)}" if plain == int(plain) else "round it"
        return f"{plain}, a {kind}; {fix}"
    plainly = value is None or isinstance(plain, bool | float | complex)
    return f"{value!r}, a {kind}" if plainly else kind
