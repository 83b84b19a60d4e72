"""The identity of the objects that a user passes as settings: selectors, scores, hooks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import cast

from drophot._core.budget import Budget
from drophot._core.json_values import Json
from drophot._core.setting_checks import is_known_by_name
from drophot.pipeline.provenance.callables import factory_name
from drophot.pipeline.provenance.fingerprints import attributes, describe
from drophot.settings.declarations import Settings
from drophot.settings.tables import SETTINGS


def described(value: object) -> Json:
    """A setting's value as JSON can hold it.

    The names of the library's own objects say everything about them. Another object is described by
    its name, code and state.
    """
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, Budget):
        return {name: one for name, one in asdict(value).items() if one is not None}
    if isinstance(value, Mapping):
        named = cast("Mapping[str, object]", value)
        return {key: described(one) for key, one in named.items()}
    name = _name(value)
    return name if is_known_by_name(value) else {"name": name, "object": describe(value)[0]}


@contextmanager
def unchanged(argument: str, value: object) -> Generator[None]:
    """Refuse an object of the user's own that changes its identity while it is used."""
    if is_known_by_name(value):
        yield
        return
    before, before_attributes = described(value), attributes(value)
    yield
    if described(value) == before:
        return
    after = attributes(value)
    changed = [name for name in after if after[name] != before_attributes.get(name)]
    what = f"the attribute `{changed[0]}`" if changed else "its state"
    raise ValueError(
        f"`{argument}` must be the same before and after its use, because its attributes are part "
        f"of what identifies the run, but {_name(value)!r} changed {what}. To cache something, "
        f"leave it out of the state: define `__getstate__` without it."
    )


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
    values: list[object] = []
    for name in SETTINGS:
        value = getattr(settings, name)
        values += value.values() if isinstance(value, Mapping) else [value]
    return [value for value in values if not is_known_by_name(value)]


def _name(value: object) -> str:
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else factory_name(value, value)
