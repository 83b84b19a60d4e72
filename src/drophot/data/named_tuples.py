"""Named tuples with one field more: a sample and its index, with the sample's own names."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any


def with_index(sample: Any, index: Any) -> Any:
    """A named tuple that has an `index` too, and is still of its own class.

    Args:
        sample: A named tuple without such a field.
        index: What the field is to hold.

    Returns:
        A named tuple of one field more.
    """
    return _make(type(sample), *sample, index)


def without_index(sample: Any) -> Any:
    """A named tuple as it was before `with_index`, or one without its field `index`.

    Args:
        sample: A named tuple with such a field.

    Returns:
        A named tuple of one field less.
    """
    kept = [getattr(sample, name) for name in sample._fields if name != "index"]
    kind = getattr(type(sample), "_without_index", None)
    if kind is None:
        kind = _shorter(type(sample).__name__, tuple(n for n in sample._fields if n != "index"))
    return kind._make(kept)


def _make(kind: type[Any], *values: Any) -> Any:
    return _longer(kind)._make(values)


@cache
def _longer(kind: Any) -> Any:
    longer: Any = namedtuple(kind.__name__, [*kind._fields, "index"])

    def reduce(self: Any) -> tuple[Any, ...]:  # a class that is made here is not found by its name
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
