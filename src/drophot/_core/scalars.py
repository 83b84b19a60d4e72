"""Conversion of a user's number to a plain `float` or `int`."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch


def real(name: str, value: Any, kind: str = "a number") -> float:
    """A real number as a float: a Python or NumPy number, a 0-d tensor, a Fraction or a Decimal.

    Bools and strings raise TypeError; NaN and numbers too large for a float raise ValueError.
    `kind` says in the error what the argument must be.
    """
    try:
        found = _as_float(value)
    except OverflowError:
        raise ValueError(f"`{name}` must be {kind}, got {value}.") from None
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be {kind}, got {_describe(value, float)}.") from None
    if math.isnan(found):
        raise ValueError(f"`{name}` must be {kind}, got nan.")
    return found


def ratio(name: str, value: Any, interval: str) -> float:
    """A ratio as a float that may be NaN; the caller checks the range."""
    try:
        return _as_float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        pass
    kind, found = type(value).__name__, _describe(value, float)
    if not found.startswith(kind):
        found = f"{kind} {found.replace(f', a {kind}', '')}"
    raise TypeError(f"`{name}` must be a number in {interval}, got {found}.")


def integer(name: str, value: Any, *, least: int | None = None) -> int:
    """An integer as an int: a Python or NumPy integer, or a 0-d tensor that holds one.

    Bools, strings and 2.0 raise TypeError; a value below `least` raises ValueError.
    """
    plain = _plain(value)
    try:
        if isinstance(plain, bool):
            raise TypeError
        found = operator.index(plain)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {_describe(value, int)}.") from None
    if least is not None and found < least:
        raise ValueError(f"`{name}` must be at least {least}, got {found}.")
    return found


def _as_float(value: Any) -> float:
    plain = _plain(value)
    if isinstance(plain, bool | str | bytes | bytearray | complex):  # float() accepts some of them
        raise TypeError
    return float(plain)


def _plain(value: Any) -> Any:
    """The Python value of a NumPy or torch scalar, None for an array; others unchanged."""
    if not isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value
    if value.shape != () or (isinstance(value, torch.Tensor) and value.is_meta):
        return None
    return value.item()


def _describe(value: Any, to: type[float] | type[int]) -> str:
    """The value and its type, with a hint how to pass it if there is one."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray) and value.shape != ():
        return f"{kind} of shape {tuple(value.shape)}. Pass a single number"
    if isinstance(value, str | bytes):
        try:
            return f"{value!r}, a {kind}. Pass {to(value)}"
        except ValueError:
            return f"{value!r}, a {kind}"
    plain = _plain(value)
    if to is int and isinstance(plain, float) and math.isfinite(plain):
        hint = f"Pass {int(plain)}" if plain == int(plain) else "Round it"
        return f"{plain}, a {kind}. {hint}"
    show_value = value is None or isinstance(plain, bool | float | complex)
    return f"{value!r}, a {kind}" if show_value else kind
