"""Optimizer hooks that are copied and pickled with their optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from drophot.prune.optimizers import HOOKS


class Follower:
    """A base class whose bound methods, as hooks of an optimizer, are copied with it."""


def hooks_of(optimizer: Optimizer) -> dict[str, dict[int, Callable[..., Any]]]:
    """The hooks of an optimizer, by the attribute that holds them."""
    return {f"_optimizer_{name}": getattr(optimizer, f"_optimizer_{name}") for name in HOOKS}


def follow(optimizer: Optimizer) -> None:
    """Let copies of an optimizer keep those of its hooks that are methods of a `Follower`.

    The optimizer's own `__getstate__` leaves all hooks out.
    """
    hooks = [hook for each in hooks_of(optimizer).values() for hook in each.values()]
    if not any(map(_is_follower, hooks)):
        vars(optimizer).pop("__getstate__", None)
    elif not isinstance(vars(optimizer).get("__getstate__"), _WithFollowers):
        vars(optimizer)["__getstate__"] = _WithFollowers(optimizer)


class _WithFollowers:
    """A `__getstate__` for one optimizer, which does not keep it alive."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def __getstate__(self) -> Optimizer | None:
        return self._optimizer()

    def __setstate__(self, state: Optimizer) -> None:
        self._optimizer = weakref.ref(state)

    def __call__(self) -> Any:
        optimizer = self._optimizer()
        assert optimizer is not None, "the optimizer calls this"
        state = type(optimizer).__getstate__(optimizer)
        if not isinstance(state, dict):
            return state
        followers = {
            attribute: type(hooks)((n, hook) for n, hook in hooks.items() if _is_follower(hook))
            for attribute, hooks in hooks_of(optimizer).items()
        }
        return state | followers | {"__getstate__": self}


def _is_follower(hook: Callable[..., Any]) -> bool:
    return isinstance(getattr(hook, "__self__", None), Follower)
