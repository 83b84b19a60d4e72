"""The whole numbers that a module's code may read as widths, wherever it keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[Any, ...]  # an attribute's name, then what to look up inside it

_OURS = frozenset(name for name in vars(nn.Module()) if name != "training")


def slots(module: nn.Module) -> Iterator[tuple[Key, int]]:
    """The whole numbers that a module keeps, in lists, dicts and plain objects too.

    Args:
        module: The module.

    Yields:
        Where each is, and the number.
    """
    for name, value in list(vars(module).items()):
        if name not in _OURS and not (isinstance(name, str) and name.startswith("__")):
            yield from _inside((name,), value, 3, set())


def _inside(key: Key, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[Key, int]]:
    if is_whole(value):
        yield key, int(value)
        return
    if depth == 0 or id(value) in seen:
        return
    if isinstance(value, (Tensor, nn.Module, str, bytes, bool, float, type)) or callable(value):
        return
    seen = seen | {id(value)}
    if isinstance(value, (list, tuple)):
        inside: list[tuple[Any, Any]] = list(enumerate(value))
    elif isinstance(value, dict):
        inside = [(name, one) for name, one in value.items() if isinstance(name, (str, int))]
    else:
        held = getattr(value, "__dict__", None)
        inside = [(f".{n}", v) for n, v in held.items()] if isinstance(held, dict) else []
    if len(inside) > 200:
        return
    for name, one in inside:
        yield from _inside((*key, name), one, depth - 1, seen)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, NumPy's too."""
    if isinstance(value, (bool, Tensor, torch.dtype)):
        return False
    return isinstance(value, int) or (
        type(value).__module__ == "numpy"
        and hasattr(value, "dtype")
        and value.dtype.kind in "iu"
        and value.ndim == 0
    )


def read(module: nn.Module, key: Key) -> Any:
    """What is in a slot.

    Args:
        module: The module.
        key: Where.

    Returns:
        The value.
    """
    value: Any = getattr(module, key[0])
    for name in key[1:]:
        value = _item(value, name)
    return value


def write(module: nn.Module, key: Key, value: Any) -> None:
    """Put something into a slot, in the type that is there.

    Args:
        module: The module.
        key: Where.
        value: What.
    """
    name, *rest = key
    old = getattr(module, name)
    if rest:
        value = _with(old, tuple(rest), value)
        if value is old:
            return
    elif type(old).__module__ == "numpy":
        value = type(old)(value)
    setattr(module, name, value)


def holder(module: nn.Module, key: Key) -> tuple[int, Any]:
    """What tells a slot from others, that of an object that modules share the same for all."""
    value: Any = module
    own, rest = id(module), key
    for place, name in enumerate(key[:-1]):
        value = getattr(value, name) if place == 0 else _item(value, name)
        if not isinstance(value, tuple):
            own, rest = id(value), key[place + 1 :]
    return own, rest


def written(key: Key) -> str:
    """A slot as it is written in code."""
    return str(key[0]) + "".join(
        name if isinstance(name, str) and name.startswith(".") else f"[{name!r}]"
        for name in key[1:]
    )


def _item(value: Any, name: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        return value[name]
    return getattr(value, name[1:])


def _with(value: Any, key: Key, new: Any) -> Any:
    """A container with something else at a place; the same one unless it is a tuple."""
    if not key:
        return type(value)(new) if type(value).__module__ == "numpy" else new
    inside = _with(_item(value, key[0]), key[1:], new)
    if isinstance(value, tuple):
        items = [inside if i == key[0] else one for i, one in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, (list, dict)):
        value[key[0]] = inside
    else:
        setattr(value, key[0][1:], inside)
    return value
