"""What the library derives from the declarations of the settings: one table for each purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import cast, get_args

from drophot._core.json_values import Json
from drophot._core.setting_declaration import Setting, StageName
from drophot.settings.declarations import Settings

SETTINGS: Mapping[str, Setting] = MappingProxyType({
    one.name: one.metadata["setting"] for one in fields(Settings)
})
"""Every setting by its name, in the order of their declaration."""

DEFAULTS: Mapping[str, object] = MappingProxyType({
    one.name: one.default for one in fields(Settings) if one.default is not MISSING
})
"""The defaults of the settings that have one."""

STAGES: tuple[StageName, ...] = get_args(StageName)
"""The stages of a grid, in their order."""

CONTROLS: Mapping[str, tuple[str, object]] = MappingProxyType({
    control: (name, value)
    for name, setting in SETTINGS.items()
    for control, value in setting.controls.items()
})
"""The controls of a grid: the setting that each changes, and the value that it sets."""

RECORD_FIELDS: Mapping[str, str] = MappingProxyType({
    name: setting.record_field for name, setting in SETTINGS.items() if setting.record_field
})
"""The fields of a `Record` that hold a setting, by the setting's name."""

SCORING_ONLY: frozenset[str] = frozenset(
    name for name, setting in SETTINGS.items() if setting.scoring_only
)
"""The settings that only step 1 depends on."""


def varying(stage: StageName = "finetune") -> list[str]:
    """The settings that runs may differ in and that results up to a stage depend on, by stage."""
    reached = STAGES[: STAGES.index(stage) + 1]
    return [
        name
        for one in reached
        for name, setting in SETTINGS.items()
        if setting.varies and setting.stage == one
    ]


def file_part(name: str, value: object) -> str:
    """The part of a stage's file name for the value of a setting; empty for most defaults."""
    setting = SETTINGS[name]
    if setting.file_part is not None:
        return setting.file_part(value)
    return "" if name in DEFAULTS and value == DEFAULTS[name] else f"{name}{value}"


def with_defaults(configuration: Mapping[str, Json]) -> dict[str, Json]:
    """Add the optional settings that a configuration leaves out, at their defaults."""
    added = {name: DEFAULTS[name] for name, setting in SETTINGS.items() if setting.optional}
    return cast("dict[str, Json]", added | dict(configuration))
