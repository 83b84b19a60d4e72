"""Finds the attributes that a network's code reads as widths, and changes those that it has to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from drophot.structured import width_attributes
from drophot.structured.observations import PassResult
from drophot.structured.recorded_call import RecordedCall
from drophot.structured.remaining_sizes import remaining_size
from drophot.structured.similar_calls import SimilarCalls
from drophot.structured.substitution import Attribute

Values = dict[Attribute, int]
Found = dict[Attribute, tuple[int, int]]  # the new value, and the call that it is for
Kind = tuple[Any, ...]  # the same attribute of all modules of a class

NEXT = 12  # how many calls ahead the code may have read a width for


class WidthSearch:
    """Finds the attributes that have to follow the number of channels.

    An attribute is changed only if a call fails without the change and no call fails because of
    it. Modules of the same class keep their widths in the same attributes, so one pass tries them
    for all of these modules, including those that were not reached because of an error of the
    network's own code. The number of passes therefore does not grow with the number of layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.known: dict[Attribute, int] = {}  # by the call that it was changed for

    def adjust(
        self,
        calls: Sequence[RecordedCall],
        removed: Tensor,
        attempt: Callable[[Values], PassResult],
    ) -> PassResult:
        """Change as few attributes as the calls need to return what they should.

        Args:
            calls: The recorded calls.
            removed: Whether each entry is removed.
            attempt: Sets attributes of the network and runs a checked pass.

        Returns:
            The result with the changes that help, which the network then has.
        """
        self._calls, self._removed = calls, removed
        self._known_changes: dict[int, dict[int, int]] = {}
        self._similar = SimilarCalls(self.modules, calls)
        self._helpers: dict[str, list[str]] = {}  # submodules that are read but not called
        for path in self.modules:
            if path not in self._similar.calls_in:
                self._helpers.setdefault(self._owner(path), []).append(path)
        accepted: Values = {}
        for attribute, number in self.known.items():
            before = int(width_attributes.read(self.modules[attribute[0]], attribute[1]))
            after = self._width_changes(number).get(before) if number < len(calls) else None
            if after is not None and after != before:
                accepted[attribute] = after
        result, current = attempt(accepted), dict(accepted)
        if not result.failures:
            return result
        # The integers before any attempt; the values of an attempt remain until the next one.
        self._integers = {
            name: dict(width_attributes.integers(module)) for name, module in self.modules.items()
        }
        tried: set[tuple[Kind, frozenset[Attribute]]] = set()
        while result.failures:
            for later in (False, True):
                kinds = self._candidates(result.failures, accepted, later)
                trials = [(kind, frozenset(found)) for kind, found in kinds.items()]
                next_trial = next((one for one in trials if one not in tried), None)
                if next_trial is not None:
                    break
            if next_trial is None:
                break
            tried.add(next_trial)
            found = kinds[next_trial[0]]
            unreached = (
                self._unreached(next_trial[0], found, accepted) if self._stopped(result) else {}
            )
            trial = {attribute: value for attribute, (value, _) in (found | unreached).items()}
            current = accepted | trial
            after = attempt(current)
            helpful = self._helpful(trial, result, after)
            if helpful and unreached:
                # Similar modules need the same change, unless they fail because of it.
                helpful |= {n for n, (_, there) in unreached.items() if there not in after.failures}
            if helpful:
                accepted |= {
                    attribute: value for attribute, value in trial.items() if attribute in helpful
                }
                self.known |= {n: (found | unreached)[n][1] for n in helpful}
                result = after if current == accepted else attempt(accepted)
                current = dict(accepted)
        if result.failures:
            accepted, result, current = self._together(accepted, result, current, attempt)
        return result if current == accepted else attempt(accepted)

    def _together(
        self,
        accepted: Values,
        result: PassResult,
        current: Values,
        attempt: Callable[[Values], PassResult],
    ) -> tuple[Values, PassResult, Values]:
        """Try attributes that help only together, such as the sizes of a split."""
        kinds = self._candidates(result.failures, accepted)
        if len(kinds) < 2:
            return accepted, result, current
        every = {
            attribute: (v, n) for found in kinds.values() for attribute, (v, n) in found.items()
        }
        trial = {attribute: value for attribute, (value, _) in every.items()}
        after = attempt(accepted | trial)
        helpful = self._helpful(trial, result, after)
        if not helpful:
            return accepted, result, accepted | trial
        trial = {attribute: value for attribute, value in trial.items() if attribute in helpful}
        for kind in kinds:  # not all of them may be needed
            fewer = {attribute: v for attribute, v in trial.items() if attribute not in kinds[kind]}
            without = attempt(accepted | fewer)
            if (
                without.failures.keys() <= after.failures.keys()
                and without.num_reached >= after.num_reached
            ):
                trial = fewer
        accepted = accepted | trial
        self.known |= {attribute: every[attribute][1] for attribute in trial}
        return accepted, attempt(accepted), dict(accepted)

    def _stopped(self, result: PassResult) -> bool:
        """Whether the network's code stopped early, so that some modules were not reached."""
        return result.num_reached < len(self._calls)

    def _unreached(self, kind: Kind, found: Found, accepted: Iterable[Attribute]) -> Found:
        """The same attribute of modules of the same class that were not reached yet."""
        more: Found = {}
        if kind[-1] is not None:  # one object that several modules share
            return more
        have = {self._identity(attribute) for attribute in (*accepted, *found)}
        for (path, key), (_, number) in found.items():
            own = self._owner(path)
            for one, there in self._similar.to(own, number):
                other = one + path.removeprefix(own)
                value = self._integers.get(other, {}).get(key)
                after = None if value is None else self._width_changes(there).get(value)
                if (
                    after is not None
                    and after != value
                    and self._identity((other, key)) not in have
                ):
                    more.setdefault((other, key), (after, there))
        return more

    def _helpful(self, trial: Values, before: PassResult, after: PassResult) -> set[Attribute]:
        """The attributes of a trial that make calls of their modules succeed and none fail."""
        fixed = {n for n in before.failures if n not in after.failures and n < after.num_reached}
        if after.num_reached > before.num_reached or not after.failures:
            fixed |= {n for n in before.failures if n not in after.failures}
        worse = {n for n in after.failures if n not in before.failures and n < before.num_reached}
        if after.num_reached < before.num_reached:
            worse |= {n for n in after.failures if n >= after.num_reached - 1}
        helpful = set()
        for path, key in trial:
            own = self._owner(path)
            inside = (
                (lambda _: True) if len(key) > 1 else (lambda n: own in self._calls[n].path)  # noqa: B023
            )
            if any(inside(n) for n in fixed) and not any(inside(n) for n in worse):
                helpful.add((path, key))
        return helpful

    def _owner(self, path: str) -> str:
        """The innermost module, from this one outwards, in which operators are called."""
        while path and path not in self._similar.calls_in:
            path = path.rpartition(".")[0]
        return path

    def _candidates(
        self, failures: Iterable[int], accepted: Iterable[Attribute], later: bool = False
    ) -> dict[Kind, Found]:
        """Attributes that equal a width of a failed call, by kind, with their new values."""
        found: dict[Kind, Found] = {}
        have = {self._identity(attribute) for attribute in accepted}
        for number in failures:
            path = self._calls[number].path
            widths = self._later_changes(number) if later else self._width_changes(number)
            around = [(depth, name) for depth, name in enumerate(reversed(path))]
            around += [(d, one) for d, name in around for one in self._helpers.get(name, ())]
            for depth, name in around:
                module = self.modules[name]
                for key, value in self._integers[name].items():
                    after = widths.get(value)
                    if after is None or after == value or self._identity((name, key)) in have:
                        continue
                    kind = (
                        depth,
                        type(module),
                        key,
                        width_attributes.identity(module, key)
                        if len(key) > 1 and any(str(k).startswith(".") for k in key)
                        else None,
                    )
                    found.setdefault(kind, {}).setdefault((name, key), (after, number))
        return dict(sorted(found.items(), key=lambda item: item[0][0]))

    def _identity(self, attribute: Attribute) -> tuple[int, Any]:
        return width_attributes.identity(self.modules[attribute[0]], attribute[1])

    def _width_changes(self, number: int) -> dict[int, int]:
        """The new width of each width of a call's inputs and outputs, if it is unambiguous."""
        if number in self._known_changes:
            return self._known_changes[number]
        widths: dict[int, set[int]] = {}
        axes = list(self._calls[number].axes)
        if self._calls[number].name == "clone" and number + 1 < len(self._calls):
            axes += self._calls[number + 1].axes  # of the reshape that failed before it was called
        for axis in axes:
            row = axis.ids.movedim(axis.dim, -1)
            widths.setdefault(row.size(-1), set()).add(remaining_size(axis, self._removed))
            if row.numel() > row.size(-1):
                alone = row.unique()
                widths.setdefault(len(alone), set()).add(
                    len(alone) - int(self._removed[alone].sum())
                )
        found = {size: next(iter(some)) for size, some in widths.items() if len(some) == 1}
        self._known_changes[number] = found
        return found

    def _later_changes(self, number: int) -> dict[int, int]:
        """The width changes of the next calls in a module: a width of 3 * 16 may be kept as 16."""
        path = self._calls[number].path
        widths: dict[int, set[int]] = {}
        for n in range(number, min(number + NEXT, len(self._calls))):
            if self._calls[n].path == path:
                for size, after in self._width_changes(n).items():
                    widths.setdefault(size, set()).add(after)
        return {size: next(iter(some)) for size, some in widths.items() if len(some) == 1}
