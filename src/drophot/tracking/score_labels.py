"""What a tracker's state says about each statistic, by which two trackers are compared."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from drophot._core import scalars
from drophot.tracking.statistics import Score, is_builtin_score


def label(name: str, score: Score) -> str:
    """`"aum"` for a built-in statistic, `"dual=DUAL(window=10, until=30)"` for an object."""
    return name if is_builtin_score(score) else f"{name}={_described(score)}"


def _described(value: object) -> str:
    """The class of an object, and the arguments of a frozen dataclass, which cannot change."""
    if is_builtin_score(value):
        return value.name
    if isinstance(value, bool | str | None):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    kind = getattr(value, "__name__", type(value).__name__)
    if is_dataclass(value) and not isinstance(value, type) and _is_frozen(value):
        compared = [one.name for one in fields(value) if one.compare and one.name != "name"]
        arguments = [f"{one}={_described(getattr(value, one))}" for one in compared]
        return f"{kind}({', '.join(arguments)})"
    try:
        return repr(scalars.real("", value)).removesuffix(".0")
    except (TypeError, ValueError):
        return kind


def _is_frozen(value: object) -> bool:
    return type(value).__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
