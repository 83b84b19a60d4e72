"""Hooks and methods that a CUDA graph may repeat: they only launch operations on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

_Method = TypeVar("_Method", bound=Callable[..., None])


class HookOwner(Protocol):
    """An object whose hooks on parameters and optimizers launch operations on the device."""

    @property
    def counts_steps(self) -> bool:
        """Whether its hooks on optimizers do more than that, which a graph would not repeat."""
        ...

    def read_by_hooks(self) -> list[Any]:
        """Values that change when the hooks have to be captured again."""
        ...


def set_owner(hook: Callable[..., Any], owner: HookOwner) -> None:
    """Declare that a CUDA graph may repeat a hook. The owner is not kept alive."""
    hook._drophot_owner = weakref.ref(owner)  # type: ignore[attr-defined]


def owner_of(hook: Callable[..., Any]) -> HookOwner | None:
    """The owner of a hook that a CUDA graph may repeat, or `None` for any other hook."""
    owner = getattr(hook, "__self__", None)
    if owner is None:
        owner = getattr(hook, "_drophot_owner", lambda: None)()
    return owner if hasattr(type(owner), "read_by_hooks") else None


def repeatable(method: _Method) -> _Method:
    """Declare that a CUDA graph may repeat a method. Overridden methods are not affected.

    `_memory_of_state` of its class returns the memory that the method writes to, or `None` if a
    graph must not repeat the method of this object.
    """
    method._drophot_repeatable = True  # type: ignore[attr-defined]
    return method


def memory_written_by(function: Callable[..., object] | None) -> list[Tensor] | None:
    """The memory that a repeatable method writes to, or `None` for any other function."""
    method = getattr(function, "__func__", None)
    owner: Any = getattr(function, "__self__", None)
    return owner._memory_of_state() if hasattr(method, "_drophot_repeatable") else None
