"""Checks the values of a stored plan, and notices what was edited in its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from math import isfinite
from typing import Any

from drophot.structured.pruning_result import Change

DIGESTS = "digests"
"""The field of the JSON that identifies the values that the plan was made with."""

_DIGESTED = ("removed", "channels", "whole_heads")


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each field that other fields depend on."""
    texts = {name: json.dumps(values[name], sort_keys=True) for name in _DIGESTED}
    return {name: sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def read(found: Any, names: Iterable[str]) -> tuple[dict[str, Any], bool]:
    """The fields of a plan from the values of its JSON, and whether `removed` was edited in it.

    Args:
        found: The values.
        names: The names of the fields.

    Raises:
        ValueError: With a sentence that names the field and its value.
    """
    expected = {*names, DIGESTS}
    if not isinstance(found, dict):
        raise _error(f"it must be a dictionary of fields, got a {type(found).__name__}")
    for word, names_off in (("without", expected - set(found)), ("with", set(found) - expected)):
        if names_off:
            raise _error(
                f"it must have the fields that `to_json` writes, got one {word} "
                f"{', '.join(sorted(map(str, names_off)))}"
            )
    for name, (is_valid, kind) in _KINDS.items():
        value = found[name]
        if not is_valid(value):
            if isinstance(value, dict):  # only the wrong ones
                value = {key: item for key, item in value.items() if not is_valid({key: item})}
            raise _wrong(name, kind, value)
    _check_channels(found["channels"], found["removed"])
    stored, current = found[DIGESTS], digests(found)
    for name in ("channels", "whole_heads"):
        if stored.get(name) != current[name]:
            raise _wrong(name, "unchanged since `plan_channels` made the plan", found[name])
    return {name: _field(name, found[name]) for name in names}, (
        stored.get("removed") != current["removed"]
    )


def _check_channels(channels: dict[str, list[int]], removed: dict[str, list[int]]) -> None:
    for layer in (*channels, *removed):
        if layer not in removed:
            raise _error(
                f"`removed` must have each layer of `channels`, but it lacks `{layer}`; pass [] "
                f"for a layer that keeps all of its channels"
            )
        if layer not in channels:
            raise _error(
                f"`removed` must have only the layers of `channels`, got `{layer}`: "
                f"{removed[layer]}"
            )
    for layer, gone in removed.items():
        size = len(channels[layer])
        if gone != sorted(set(gone)) or not all(0 <= index < size for index in gone):
            raise _error(
                f"`removed` must have ascending indices in [0, {size}) for `{layer}`, got {gone}"
            )
        if size and len(gone) == size:
            raise _error(
                f"`removed` must leave each layer at least one channel, but `{layer}` loses all "
                f"{size}"
            )


def _field(name: str, value: Any) -> Any:
    """A checked value in the type that the plan has it in."""
    if name in ("removed", "channels"):
        return {layer: tuple(indices) for layer, indices in value.items()}
    if name in _COSTS:
        return None if value is None else Change(*value)
    if name == "latency":
        return None if value is None else tuple(value)
    if name == "whole_heads":
        return tuple((path, width) for path, width in value)
    return tuple(value) if name == "skip" else value


def _wrong(name: str, kind: str, value: Any) -> ValueError:
    return _error(f"`{name}` must be {kind}, got {value!r:.200}")


def _error(problem: str) -> ValueError:
    return ValueError(
        f"`text` must be the JSON of a ChannelPlan, but {problem}. Pass the result of `to_json`."
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value > 0


def _is_pair(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_item, value))


def _is_mapping(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_item, value.values()))


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_item, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_change(value: Any) -> bool:
    return value is None or _is_pair(value, _is_count)


def _are_indices(value: Any) -> bool:
    return _is_mapping(value, lambda item: _is_list(item, lambda index: type(index) is int))


def _is_head(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _is_count(value[1])
    )


_COSTS = ("parameters", "flops", "bytes")

# By field: whether a value is of the right kind, and what it must be, in words.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "request": (_is_text, "a string"),
    "removed": (_are_indices, "an object with a list of indices for each layer"),
    "channels": (_are_indices, "an object with a list of integers for each layer"),
    "reasons": (lambda value: _is_mapping(value, _is_text), "an object of strings"),
    **dict.fromkeys(_COSTS, (_is_change, "null or two counts, before and after")),
    "latency": (
        lambda value: value is None or _is_pair(value, _is_time),
        "null or two positive numbers, before and after",
    ),
    "skip": (lambda value: _is_list(value, _is_text), "a list of names"),
    "whole_heads": (
        lambda value: _is_list(value, _is_head),
        "a list of pairs of a module's name and a width",
    ),
    DIGESTS: (lambda value: _is_mapping(value, _is_text), "an object of strings"),
}
