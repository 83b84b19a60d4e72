"""Look up a value of a parameter by any of its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from torch import nn

from drophot.prune.current_parameters import without_wrappers

T = TypeVar("T")


class ParameterValues(Generic[T]):
    """Values of the parameters of a model.

    A value is found by any name of a shared parameter, with or without the prefixes of wrappers
    (`torch.compile`, DDP, EMA), regardless of which of the two models is wrapped.

    Args:
        model: The model.
        values: The values, each by one name of its parameter.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, T]) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        found = {id(named[name]): value for name, value in values.items() if name in named}
        self._values = {name: found[id(p)] for name, p in named.items() if id(p) in found}
        plain: dict[str, dict[int, str]] = {}  # without the parts of wrappers
        for name, parameter in named.items():
            plain.setdefault(without_wrappers(name), {}).setdefault(id(parameter), name)
        # Names that are ambiguous without the prefixes are left out.
        self._names = {
            name: next(iter(own.values())) for name, own in plain.items() if len(own) == 1
        }

    def get(self, name: str) -> T | None:
        """The value; `None` if it is unknown or several parameters could be meant."""
        if name in self._values:
            return self._values[name]
        return self._values.get(self._names.get(without_wrappers(name), ""))
