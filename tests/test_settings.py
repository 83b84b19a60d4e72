"""The declarations of settings, and what is derived from them."""

import inspect
import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_args

import pytest
import torch

from drophot import DropHot, Record, Scored, Stratified
from drophot._core.mode_names import ModeName
from drophot.pipeline.config import Arguments
from drophot.prune.importances import Random, l1, layer_normalized
from drophot.settings.declarations import Settings
from drophot.settings.names import name_of
from drophot.settings.tables import (
    CONTROLS,
    DEFAULTS,
    RECORD_FIELDS,
    SETTINGS,
    file_part,
    varying,
    with_defaults,
)

REQUIRED: dict[str, Any] = {"data_ratio": 0.5, "mode": "high", "prune_ratio": 0.8}


def settings(**changes: Any) -> Settings:
    return Settings(**(REQUIRED | changes))


def test_the_constructor_of_a_run_takes_every_setting_and_its_docstring_describes_it() -> None:
    parameters = inspect.signature(DropHot).parameters
    assert list(parameters)[:3] == ["model", "train_set", "test_set"]
    assert set(parameters) == {one.name for one in fields(Arguments)}
    assert DropHot.__doc__ is not None
    described = re.findall(r"^        (\w+): ", DropHot.__doc__, re.M)
    assert set(described) >= set(parameters)
    for name in SETTINGS:
        default = parameters[name].default
        assert default == DEFAULTS.get(name, inspect.Parameter.empty)
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_record_has_the_fields_that_settings_name() -> None:
    known = {one.name for one in fields(Record)}
    assert set(RECORD_FIELDS.values()) <= known
    assert len(set(RECORD_FIELDS.values())) == len(RECORD_FIELDS)


def test_values_become_plain_and_stay() -> None:
    found = settings(data_ratio=torch.tensor(0.5), seed=torch.tensor(3))
    assert (type(found.data_ratio), type(found.seed)) == (float, int)
    assert replace(found, seed=4).seed == 4
    with pytest.raises(FrozenInstanceError):
        found.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_ratio": 80}, r"`data_ratio` .*80.*0\.8"),
        ({"prune_ratio": 1.0}, r"`prune_ratio` .*1\.0"),
        ({"mode": "hard"}, "`mode` .*'hard'"),
        ({"schedule": "slow"}, "`schedule` .*'slow'"),
        ({"rewind": 1}, "`rewind` .*1"),
        ({"prunings": 0}, "`prunings` .*0"),
        ({"protocol": "code"}, "`protocol` .*'code'"),
        ({"importance": 3}, "`importance` .*3"),
        ({"rewind": True, "reinitialize": True}, "`rewind=True`.*`reinitialize=True`"),
        ({"structured": True, "scope": "erk"}, "`structured=True`.*`scope='erk'`"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        settings(**changes)
    with pytest.raises((TypeError, ValueError), match=words):
        replace(settings(), **changes)


def test_a_control_sets_a_value_that_its_setting_takes() -> None:
    assert list(CONTROLS) == [
        *("equal_steps", "reinitialize", "rewind", "recalibrate_bn", "repair"),
        *("gradual", "iterative", "joint"),
    ]
    for name, value in CONTROLS.values():
        assert SETTINGS[name].varies
        assert getattr(settings(**{name: value}), name) == value != DEFAULTS[name]


def test_stages_depend_on_what_they_depend_on_before() -> None:
    assert varying("score") == ["seed"]
    assert varying("train")[:1] == ["seed"]
    assert set(varying("train")) - {"seed"} == {"data_ratio", "mode", "equal_steps"}
    assert varying()[: len(varying("train"))] == varying("train")
    assert set(varying()) == {name for name, one in SETTINGS.items() if one.varies}


def test_the_values_of_a_varying_setting_have_different_parts_of_a_file_s_name() -> None:
    values: dict[str, tuple[Any, ...]] = {
        "mode": (*get_args(ModeName), Stratified(), Scored("el2n")),
        "schedule": ("one-shot", "gradual", "iterative", "joint"),
        **dict.fromkeys(("data_ratio", "prune_ratio"), (0.25, 0.5)),
        "seed": (0, 1),
        "importance": (None, l1, layer_normalized, Random(), lambda name, weight: weight),
    }
    for name in varying():
        parts = [file_part(name, value) for value in values.get(name, (False, True))]
        assert len(set(parts)) == len(parts)
        assert all(re.fullmatch(r"[A-Za-z0-9._-]*", part) for part in parts)
    assert file_part("mode", Scored("el2n")) == "el2n-high" == name_of(Scored("el2n"))


def test_an_optional_setting_is_filled_in() -> None:
    assert with_defaults({"seed": 1}) == {
        "repair": False,
        "importance": None,
        "rules": None,
        "seed": 1,
    }
    assert with_defaults({"importance": "x"}) == {
        "repair": False,
        "importance": "x",
        "rules": None,
    }
