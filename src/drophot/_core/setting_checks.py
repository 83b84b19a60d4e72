"""Checks of a setting's value, called with its name and the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from drophot._core.budget import Budget


def one_of(*choices: str) -> Callable[[str, Any], object]:
    def check(name: str, value: Any) -> object:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"`{name}` must be one of {_listed(choices)}, got {value!r}.")
        return value

    return check


def check_flag(name: str, value: object) -> bool:
    """The value, checked to be `True` or `False`."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return value


def name_or_object(
    choices: tuple[str, ...], objects: str, *, reserved: str
) -> Callable[[str, Any], object]:
    """A check for one of some short names, or an object that has a name.

    A user's object must not have one of the short names, or one that the regular expression
    `reserved` matches.
    """

    def check(name: str, value: Any) -> object:
        if isinstance(value, str) and value in choices:
            return value
        called = getattr(value, "name", None)
        if isinstance(value, str) or not isinstance(called, str):
            raise ValueError(
                f"`{name}` must be one of {_listed(choices)}, or {objects}, got {value!r}."
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]+", called):
            raise ValueError(
                f"`{name}` has the name {called!r}, which file names cannot contain. Use letters, "
                f"digits, '.', '_' and '-' only."
            )
        is_reserved = called in choices or re.fullmatch(reserved, called)
        if is_reserved and not is_known_by_name(value):
            raise ValueError(
                f"`{name}` has the name {called!r}, which the library uses itself. Give your "
                f"object another name, so that records tell the two apart."
            )
        return value

    return check


def check_structured(name: str, value: object) -> bool | Budget:
    """Whether channels are removed, or the budget to which they are."""
    if not isinstance(value, Budget):
        if isinstance(value, bool):
            return value
        raise TypeError(
            f"`{name}` must be True, False or a Budget, got {value!r}. Pass "
            f"{name}=Budget(parameters=1_000_000), for example."
        )
    if value.latency is not None:
        raise ValueError(
            f"`{name}` must not limit the latency, got {value!r}: a measured time is not the same "
            f"in each run, so the results could not be reproduced. Limit `flops` instead."
        )
    return value


def is_known_by_name(value: object) -> bool:
    """Whether the name of an object says everything about it.

    That is so for plain values, and for objects of the library's own classes that make their name
    of their other fields. A name that is a field is the user's choice.
    """
    if isinstance(value, bool | int | float | str | None):
        return True
    if type(value).__module__.partition(".")[0] != "drophot" or not is_dataclass(value):
        return False
    names = [one.name for one in fields(value)]
    return "name" not in names and all(is_known_by_name(getattr(value, one)) for one in names)


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(f'"{choice}"' for choice in choices)
