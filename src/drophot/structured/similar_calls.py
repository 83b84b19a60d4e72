"""Finds the calls that different modules of one class make in the same place of their code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from drophot.structured.recorded_call import RecordedCall


class SimilarCalls:
    """The recorded calls by module, and for each call the similar ones of other modules.

    Args:
        modules: All modules of the network, by path.
        calls: The recorded calls.
    """

    def __init__(self, modules: Mapping[str, nn.Module], calls: Sequence[RecordedCall]) -> None:
        self.modules = modules
        self.calls = calls
        self.calls_in: dict[str, list[int]] = {}  # the numbers of the calls in each module
        for number, call in enumerate(calls):
            for path in dict.fromkeys(call.path):
                self.calls_in.setdefault(path, []).append(number)

    def owner(self, number: int) -> str:
        """The innermost module around a call that is not one of torch's own layers."""
        path = self.calls[number].path
        own = [p for p in path if not type(self.modules[p]).__module__.startswith("torch.nn")]
        return (own or path)[-1]

    def to(self, path: str, number: int) -> list[tuple[str, int]]:
        """For a call in a module: the other modules of its class, and the similar call in each."""
        position = self.calls_in[path].index(number)
        kind, name = type(self.modules[path]), self.calls[number].name
        return [
            (other, numbers[position])
            for other, numbers in self.calls_in.items()
            if other != path
            and type(self.modules[other]) is kind
            and position < len(numbers)
            and self.calls[numbers[position]].name == name
        ]
