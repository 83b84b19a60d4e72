"""What the library needs to know about a setting of a run: the metadata of its field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec

StageName = Literal["score", "train", "finetune"]

_P = ParamSpec("_P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The properties of a setting besides its name, type and default.

    Example:
        >>> from dataclasses import fields
        >>> from drophot.settings import Settings
        >>> declared = {field.name: field.metadata["setting"] for field in fields(Settings)}
        >>> declared["prune_ratio"].stage
        'finetune'
    """

    check: Callable[[str, Any], object]
    """Called with the setting's name and the user's value; returns the plain value or raises."""
    stage: StageName
    """The first stage of a grid whose result depends on the setting."""
    varies: bool = False
    """Whether the runs of a grid may differ in it."""
    scoring_only: bool = False
    """Whether the results of a mode that needs no scoring are independent of it."""
    record_field: str | None = None
    """The field of a `Record` that holds it; otherwise only `Record.settings` does."""
    heading: str | None = None
    """The heading of its column in tables whose rows differ in it; otherwise its name. Settings
    with a column in every table need none."""
    words: Mapping[object, str] = field(default_factory=dict[object, str])
    """How tables write its values."""
    controls: Mapping[str, object] = field(default_factory=dict[str, object])
    """The controls of a grid that change it, each with the value that it sets."""
    file_part: Callable[[Any], str] | None = None
    """The part of a stage's file name for a value; by default name and value, and nothing for the
    setting's default."""
    optional: bool = False
    """Whether a configuration leaves it out at its default, so that runs from before the setting
    was added keep their identity."""


def _in_metadata(make: Callable[_P, Setting]) -> Callable[_P, dict[str, Setting]]:
    def declare(*args: _P.args, **kwargs: _P.kwargs) -> dict[str, Setting]:
        return {"setting": make(*args, **kwargs)}

    return declare


declare = _in_metadata(Setting)
