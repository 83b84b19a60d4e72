"""Variables that code fills or counts up while it runs: logs, caches and counters.

They do not belong to the identity of an experiment, since each run changes them.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast

from drophot.pipeline.provenance import bytecode

MISSING = object()
_CONTAINERS = (list, dict, set, deque)


def without_accumulated(codes: list[types.CodeType]) -> Callable[[str, Any], Any]:
    """A function that leaves out of a variable's value what some code fills or counts up.

    Called with the variable's name and value, it returns the rest, or `MISSING` if there is none.
    """
    fills = [bytecode.filled(code) for code in codes]
    counted = {name for code in codes for name in bytecode.counted(code)}

    def rest(name: str, value: Any) -> Any:
        if name in counted and type(value) is int:
            return MISSING
        found = [by_name[name] for by_name in fills if name in by_name]
        written = {key for one in found for key in one.written}
        others = any(one.others for one in found)
        if not isinstance(value, _CONTAINERS) or not (written or others):
            return cast(Any, value)
        if not isinstance(value, dict):
            return MISSING
        read = {key for one in found for key in one.read}
        items = cast(Mapping[Any, Any], value).items()
        kept = {k: v for k, v in items if k not in written and (not others or k in read)}
        return kept or MISSING

    return rest
