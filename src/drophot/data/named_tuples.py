"""Named tuples with an additional field `index`."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any


def with_index(sample: Any, index: Any) -> Any:
    """A sample with an additional field `index`, still an instance of its class."""
    return _make(type(sample), *sample, index)


def without_index(sample: Any) -> Any:
    """A sample without its field `index`; the original class if `with_index` added the field."""
    values = [getattr(sample, name) for name in sample._fields if name != "index"]
    kind = getattr(type(sample), "_without_index", None)
    if kind is None:
        kind = _shorter(type(sample).__name__, tuple(n for n in sample._fields if n != "index"))
    return kind._make(values)


def _make(kind: type[Any], *values: Any) -> Any:
    return _longer(kind)._make(values)


@cache
def _longer(kind: Any) -> Any:
    longer: Any = namedtuple(kind.__name__, [*kind._fields, "index"])

    def reduce(
        self: Any,
    ) -> tuple[Any, ...]:  # pickle cannot find a class that is created here by its name
        return _make, (kind, *self)

    return type(
        kind.__name__,
        (longer, kind),
        {
            "__slots__": (),
            "__reduce__": reduce,
            "__doc__": kind.__doc__,
            "__module__": kind.__module__,
            "_without_index": kind,
        },
    )


@cache
def _shorter(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)
