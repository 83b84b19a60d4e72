"""What a tracker's state says about each statistic, by which two trackers are compared."""

from __future__ import annotations

import ast
from dataclasses import fields, is_dataclass
from typing import Any

from drophot._core import scalars
from drophot.tracking.sequence_scores import FirstLearned, Last, MovingAverage
from drophot.tracking.statistics import BUILT_IN, Score, Spread, is_builtin_score
from drophot.tracking.window_statistics import DUAL, TDDS, WindowSpread

_CLASSES = {
    kind.__name__: kind
    for kind in (DUAL, TDDS, FirstLearned, Last, MovingAverage, Spread, WindowSpread)
}


def label(name: str, score: Score) -> str:
    """`"aum"` for a built-in statistic, `"dual=DUAL(window=10, until=30)"` for an object."""
    return name if is_builtin_score(score) else f"{name}={_described(score)}"


def name_in(label: str) -> str:
    """The name of the statistic that a label is of."""
    return label.partition("=")[0]


def score_of(label: str) -> Score | None:
    """The statistic that a label is of, or `None` if it is not one of the library's classes."""
    name, _, described = label.partition("=")
    if not described:
        return BUILT_IN.get(name)
    try:
        call = ast.parse(described, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        arguments: dict[str, Any] = {str(o.arg): _value_of(o.value) for o in call.keywords}
        return _CLASSES[call.func.id](**arguments, name=name)
    except (KeyError, SyntaxError, TypeError, ValueError):
        return None


def _value_of(argument: ast.expr) -> object:
    return BUILT_IN[argument.id] if isinstance(argument, ast.Name) else ast.literal_eval(argument)


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
