"""The identity of the objects that a user passes as settings: selectors, scores, hooks."""

from __future__ import annotations

from typing import Any

from drophot._core.setting_checks import is_known_by_name
from drophot.pipeline.provenance.callables import factory_name
from drophot.pipeline.provenance.fingerprints import describe
from drophot.settings import SETTINGS, Settings


def described(value: object) -> Any:
    """A setting's value as JSON can hold it.

    The names of the library's own objects say everything about them. Another object is described by
    its name, code and state.
    """
    if isinstance(value, bool | int | float | str | None):
        return value
    name = _name(value)
    return name if is_known_by_name(value) else {"name": name, "object": describe(value)[0]}


def unknown_parts(settings: Settings) -> list[str]:
    """The parts of the settings that two processes cannot compare, each with its setting."""
    return [
        f"{lack} in `{name}`"
        for name in SETTINGS
        if not is_known_by_name(value := getattr(settings, name))
        for lack in describe(value)[1]
    ]


def own_objects(settings: Settings) -> list[object]:
    """The values of the settings that a user defined."""
    values = [getattr(settings, name) for name in SETTINGS]
    return [value for value in values if not is_known_by_name(value)]


def _name(value: object) -> str:
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else factory_name(value, value)
