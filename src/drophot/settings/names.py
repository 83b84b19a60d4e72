"""The names of modes and protocols, which are strings or objects with a name."""

from __future__ import annotations

import re
from typing import Protocol

from drophot._core.mode_names import BASELINE, SAMPLING_MODES, ModeName


class Named(Protocol):
    """An object that records, files and tables call by its name."""

    @property
    def name(self) -> str:
        """Letters, digits, dots, hyphens and underscores."""
        ...


Mode = ModeName | Named


def name_of(value: str | Named) -> str:
    """The name of a mode or a protocol in records, files and tables."""
    return value if isinstance(value, str) else value.name


def needs_scoring(mode: str | Named) -> bool:
    """Whether a mode selects by a result of step 1."""
    needs = getattr(mode, "needs", None)
    if needs is None:  # a name, which says nothing about a user's own selector
        name = name_of(mode)
        return name not in _WITHOUT_SCORING and not re.match(r"adaptive\d+-", name)
    return not {"scores", "confidence", "model"}.isdisjoint(needs)


_WITHOUT_SCORING = {BASELINE, "random", "random-balanced", *SAMPLING_MODES}
