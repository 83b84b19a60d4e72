"""Numbers that a network's code reads as widths: those that mend a call which fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from drophot import _slots
from drophot._check import Seen, left
from drophot._trace import Call

Names = tuple[str, _slots.Key]  # of a module, and where in it
Numbers = dict[Names, int]
Kind = tuple[Any, ...]  # the same slot of the modules of a class


class Widths:
    """Finds the numbers that have to follow the channels.

    A number is changed only if a call fails without that and none fails for it. Modules of the same
    class keep their widths in the same place, so that one trial is of all of them.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.known: dict[Names, int] = {}  # which call each of them mended

    def learn(
        self, calls: Sequence[Call], gone: Tensor, attempt: Callable[[Numbers], Seen]
    ) -> Seen:
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
        accepted: Numbers = {}
        for names, number in self.known.items():
            before = int(_slots.read(self.modules[names[0]], names[1]))
            after = self._widths(number).get(before) if number < len(calls) else None
            if after is not None and after != before:
                accepted[names] = after
        seen = attempt(accepted)
        if not seen.failures:
            return seen
        # As they are before any trial, whose numbers are left in the modules.
        self._slots = {
            name: list(_slots.slots(module)) for name, module in self.modules.items()
        }
        tried: set[Kind] = set()
        while seen.failures:
            kinds = self._candidates(seen.failures, accepted)
            kind = next((kind for kind in kinds if kind not in tried), None)
            if kind is None:
                break
            tried.add(kind)
            trial = {names: value for names, (value, _) in kinds[kind].items()}
            good = self._good(trial, seen, attempt(accepted | trial))
            if good:
                accepted |= {names: trial[names] for names in good}
                self.known |= {names: kinds[kind][names][1] for names in good}
                seen = attempt(accepted)
        if seen.failures:
            accepted, seen = self._together(accepted, seen, attempt)
        return attempt(accepted)

    def _together(
        self, accepted: Numbers, seen: Seen, attempt: Callable[[Numbers], Seen]
    ) -> tuple[Numbers, Seen]:
        """Numbers that help only together, as the sizes of a split."""
        kinds = self._candidates(seen.failures, accepted)
        every = {names: (v, n) for found in kinds.values() for names, (v, n) in found.items()}
        if len(kinds) < 2:
            return accepted, seen
        after = attempt(accepted | {names: value for names, (value, _) in every.items()})
        trial = {names: value for names, (value, _) in every.items()}
        good = self._good(trial, seen, after)
        if not good:
            return accepted, seen
        trial = {names: trial[names] for names in good}
        for kind in kinds:  # one of them may not be needed
            fewer = {names: v for names, v in trial.items() if names not in kinds[kind]}
            without = attempt(accepted | fewer)
            if without.failures.keys() <= after.failures.keys() and without.end >= after.end:
                trial = fewer
        if trial:
            accepted = accepted | trial
            self.known |= {names: every[names][1] for names in trial}
        return accepted, attempt(accepted)

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
            inside = (
                (lambda _: True) if len(key) > 1 else (lambda n: path in self._calls[n].path)  # noqa: B023
            )
            if any(inside(n) for n in mended) and not any(inside(n) for n in worse):
                good.add((path, key))
        return good

    def _candidates(
        self, failures: Mapping[int, str], accepted: Iterable[Names]
    ) -> dict[Kind, dict[Names, tuple[int, int]]]:
        """Numbers that are the width of something at a call that fails, by their kind."""
        found: dict[Kind, dict[Names, tuple[int, int]]] = {}
        have = {self._holder(names) for names in accepted}
        for number in failures:
            widths = self._widths(number)
            path = self._calls[number].path
            for depth, name in enumerate(reversed(path)):
                module = self.modules[name]
                for key, value in self._slots[name]:
                    after = widths.get(value)
                    if after is None or after == value or self._holder((name, key)) in have:
                        continue
                    kind = (
                        depth,
                        type(module),
                        key,
                        _slots.holder(module, key)
                        if len(key) > 1 and any(str(k).startswith(".") for k in key)
                        else None,
                    )
                    found.setdefault(kind, {}).setdefault((name, key), (after, number))
        return dict(sorted(found.items(), key=lambda item: item[0][0]))

    def _holder(self, names: Names) -> tuple[int, Any]:
        return _slots.holder(self.modules[names[0]], names[1])

    def _widths(self, number: int) -> dict[int, int]:
        """What became of the widths of what a call is given and gives, where there is no doubt."""
        if number in self._sizes:
            return self._sizes[number]
        widths: dict[int, set[int]] = {}
        for axis in self._calls[number].axes:
            row = axis.ids.movedim(axis.dim, -1)
            widths.setdefault(row.size(-1), set()).add(left(axis, self._gone))
            if row.numel() > row.size(-1):
                alone = row.unique()
                widths.setdefault(len(alone), set()).add(len(alone) - int(self._gone[alone].sum()))
        found = {size: next(iter(some)) for size, some in widths.items() if len(some) == 1}
        self._sizes[number] = found
        return found
