"""Functions of the user: what a partial calls, and whether they take the arguments they get."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial


def without_partials(function: object) -> object:
    """The function that a `functools.partial` calls, or the object itself."""
    while isinstance(function, partial):
        function = function.func
    return function


def bound_keywords(function: object) -> dict[str, object]:
    """The keyword arguments that a `functools.partial` sets, those of the outermost first."""
    bound: dict[str, object] = {}
    while isinstance(function, partial):
        bound = function.keywords | bound
        function = function.func
    return bound


def signature_error(function: Callable[..., object], *args: object, **kwargs: object) -> str:
    """Why a function cannot take these arguments; empty if it can or has no known signature."""
    if not callable(function):
        return f"{function!r:.80}, which is not callable"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"{name}{signature}: {error}"
    return ""
