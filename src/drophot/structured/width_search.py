"""Numbers that a network's code reads as widths: those that mend a call which fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from drophot.structured import width_attributes
from drophot.structured.observations import Seen
from drophot.structured.remaining_sizes import left
from drophot.structured.tracer import Call

Names = tuple[str, width_attributes.Key]  # of a module, and where in it
Numbers = dict[Names, int]
Kind = tuple[Any, ...]  # the same slot of the modules of a class


class Widths:
    """Finds the numbers that have to follow the channels.

    A number is changed only if a call fails without that and none fails for it. Modules of the same
    class keep their widths in the same place, so that one trial is of all of them, of those too
    that an error of the network's own code hides: passes do not grow with the number of layers.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.known: dict[Names, int] = {}  # which call each of them mended

    def learn(self, calls: Sequence[Call], gone: Any, attempt: Callable[[Numbers], Seen]) -> Seen:
        """Change as few numbers as needed for the calls to do what they did.

        Args:
            calls: What the network did.
            gone: The entries that are gone.
            attempt: Puts numbers in and says what is seen then.

        Returns:
            What is seen with the numbers that help, which are in the network then.
        """
        self._calls, self._gone = calls, gone
        self._sizes: dict[int, dict[int, int]] = {}
        self._like = Alike(self.modules, calls)
        self._helpers: dict[str, list[str]] = {}  # that a module's code uses without calling them
        for path in self.modules:
            if path not in self._like.inside:
                self._helpers.setdefault(self._called(path), []).append(path)
        accepted: Numbers = {}
        for names, number in self.known.items():
            before = int(width_attributes.read(self.modules[names[0]], names[1]))
            after = self._widths(number).get(before) if number < len(calls) else None
            if after is not None and after != before:
                accepted[names] = after
        seen, current = attempt(accepted), dict(accepted)
        if not seen.failures:
            return seen
        # As they are before any trial, whose numbers stay in the modules until the next one.
        self._slots = {
            name: dict(width_attributes.slots(module)) for name, module in self.modules.items()
        }
        tried: set[tuple[Kind, frozenset[Names]]] = set()
        while seen.failures:
            for later in (False, True):
                kinds = self._candidates(seen.failures, accepted, later)
                trials = [(kind, frozenset(found)) for kind, found in kinds.items()]
                trial_of = next((one for one in trials if one not in tried), None)
                if trial_of is not None:
                    break
            if trial_of is None:
                break
            tried.add(trial_of)
            found = kinds[trial_of[0]]
            hidden = self._hidden(trial_of[0], found, accepted) if self._stopped(seen) else {}
            trial = {names: value for names, (value, _) in (found | hidden).items()}
            current = accepted | trial
            after = attempt(current)
            good = self._good(trial, seen, after)
            if good and hidden:  # the others are like these, where they do not fail for it
                good |= {n for n, (_, there) in hidden.items() if there not in after.failures}
            if good:
                accepted |= {names: value for names, value in trial.items() if names in good}
                self.known |= {n: (found | hidden)[n][1] for n in good}
                seen = after if current == accepted else attempt(accepted)
                current = dict(accepted)
        if seen.failures:
            accepted, seen, current = self._together(accepted, seen, current, attempt)
        return seen if current == accepted else attempt(accepted)

    def _together(
        self,
        accepted: Numbers,
        seen: Seen,
        current: Numbers,
        attempt: Callable[[Numbers], Seen],
    ) -> tuple[Numbers, Seen, Numbers]:
        """Numbers that help only together, as the sizes of a split."""
        kinds = self._candidates(seen.failures, accepted)
        if len(kinds) < 2:
            return accepted, seen, current
        every = {names: (v, n) for found in kinds.values() for names, (v, n) in found.items()}
        trial = {names: value for names, (value, _) in every.items()}
        after = attempt(accepted | trial)
        good = self._good(trial, seen, after)
        if not good:
            return accepted, seen, accepted | trial
        trial = {names: value for names, value in trial.items() if names in good}
        for kind in kinds:  # one of them may not be needed
            fewer = {names: v for names, v in trial.items() if names not in kinds[kind]}
            without = attempt(accepted | fewer)
            if without.failures.keys() <= after.failures.keys() and without.end >= after.end:
                trial = fewer
        accepted = accepted | trial
        self.known |= {names: every[names][1] for names in trial}
        return accepted, attempt(accepted), dict(accepted)

    def _stopped(self, seen: Seen) -> bool:
        """Whether the network's code went no further, so that other modules were not reached."""
        return seen.end < len(self._calls)

    def _hidden(
        self, kind: Kind, found: Mapping[Names, tuple[int, int]], accepted: Iterable[Names]
    ) -> dict[Names, tuple[int, int]]:
        """The same slot of modules of the same class that come later."""
        more: dict[Names, tuple[int, int]] = {}
        if kind[-1] is not None:  # an object that modules share
            return more
        have = {self._holder(names) for names in (*accepted, *found)}
        for (path, key), (_, number) in found.items():
            own = self._called(path)
            for one, there in self._like.to(own, number):
                other = one + path.removeprefix(own)
                value = self._slots.get(other, {}).get(key)
                after = None if value is None else self._widths(there).get(value)
                if after is not None and after != value and self._holder((other, key)) not in have:
                    more.setdefault((other, key), (after, there))
        return more

    def _good(self, trial: Numbers, before: Seen, after: Seen) -> set[Names]:
        """Those of some numbers with which calls of their modules do not fail any more."""
        mended = {n for n in before.failures if n not in after.failures and n < after.end}
        if after.end > before.end or not after.failures:
            mended |= {n for n in before.failures if n not in after.failures}
        worse = {n for n in after.failures if n not in before.failures and n < before.end}
        if after.end < before.end:
            worse |= {n for n in after.failures if n >= after.end - 1}
        good = set()
        for path, key in trial:
            own = self._called(path)
            inside = (
                (lambda _: True) if len(key) > 1 else (lambda n: own in self._calls[n].path)  # noqa: B023
            )
            if any(inside(n) for n in mended) and not any(inside(n) for n in worse):
                good.add((path, key))
        return good

    def _called(self, path: str) -> str:
        """The innermost module around one, or it itself, that an operator is called in."""
        while path and path not in self._like.inside:
            path = path.rpartition(".")[0]
        return path

    def _candidates(
        self, failures: Iterable[int], accepted: Iterable[Names], later: bool = False
    ) -> dict[Kind, dict[Names, tuple[int, int]]]:
        """Numbers that are the width of something at a call that fails, by their kind."""
        found: dict[Kind, dict[Names, tuple[int, int]]] = {}
        have = {self._holder(names) for names in accepted}
        for number in failures:
            path = self._calls[number].path
            widths = self._later(number) if later else self._widths(number)
            around = [(depth, name) for depth, name in enumerate(reversed(path))]
            around += [(d, one) for d, name in around for one in self._helpers.get(name, ())]
            for depth, name in around:
                module = self.modules[name]
                for key, value in self._slots[name].items():
                    after = widths.get(value)
                    if after is None or after == value or self._holder((name, key)) in have:
                        continue
                    kind = (
                        depth,
                        type(module),
                        key,
                        width_attributes.holder(module, key)
                        if len(key) > 1 and any(str(k).startswith(".") for k in key)
                        else None,
                    )
                    found.setdefault(kind, {}).setdefault((name, key), (after, number))
        return dict(sorted(found.items(), key=lambda item: item[0][0]))

    def _holder(self, names: Names) -> tuple[int, Any]:
        return width_attributes.holder(self.modules[names[0]], names[1])

    def _widths(self, number: int) -> dict[int, int]:
        """What became of the widths of what a call is given and gives, where there is no doubt."""
        if number in self._sizes:
            return self._sizes[number]
        widths: dict[int, set[int]] = {}
        axes = list(self._calls[number].axes)
        if self._calls[number].name == "clone" and number + 1 < len(self._calls):
            axes += self._calls[number + 1].axes  # the reshape that asks for it, and is refused
        for axis in axes:
            row = axis.ids.movedim(axis.dim, -1)
            widths.setdefault(row.size(-1), set()).add(left(axis, self._gone))
            if row.numel() > row.size(-1):
                alone = row.unique()
                widths.setdefault(len(alone), set()).add(len(alone) - int(self._gone[alone].sum()))
        found = {size: next(iter(some)) for size, some in widths.items() if len(some) == 1}
        self._sizes[number] = found
        return found

    def _later(self, number: int) -> dict[int, int]:
        """The same for the calls that come next in a module: of 3 * 16, the width may be 16."""
        path = self._calls[number].path
        widths: dict[int, set[int]] = {}
        for n in range(number, min(number + NEXT, len(self._calls))):
            if self._calls[n].path == path:
                for size, after in self._widths(n).items():
                    widths.setdefault(size, set()).add(after)
        return {size: next(iter(some)) for size, some in widths.items() if len(some) == 1}


NEXT = 12  # calls that are looked through for what code was about to use


class Alike:
    """Which calls of modules of the same class are the same call of their code.

    Args:
        modules: By path.
        calls: What the network did.
    """

    def __init__(self, modules: Mapping[str, nn.Module], calls: Sequence[Call]) -> None:
        self.modules = modules
        self.calls = calls
        self.inside: dict[str, list[int]] = {}  # the calls of each module, in order
        for number, call in enumerate(calls):
            for path in dict.fromkeys(call.path):
                self.inside.setdefault(path, []).append(number)

    def owner(self, number: int) -> str:
        """The module whose code a call is in, rather than a layer of torch's in it."""
        path = self.calls[number].path
        own = [p for p in path if not type(self.modules[p]).__module__.startswith("torch.nn")]
        return (own or path)[-1]

    def to(self, path: str, number: int) -> list[tuple[str, int]]:
        """The modules like one, and in each the call that is like one of its calls."""
        place = self.inside[path].index(number)
        kind, name = type(self.modules[path]), self.calls[number].name
        return [
            (other, numbers[place])
            for other, numbers in self.inside.items()
            if other != path
            and type(self.modules[other]) is kind
            and place < len(numbers)
            and self.calls[numbers[place]].name == name
        ]
