"""Integers that a module keeps and that its code may read as widths, and how to change them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[Any, ...]  # an attribute's name, then what to look up inside it

_OF_TORCH = frozenset(name for name in vars(nn.Module()) if name != "training")


def integers(module: nn.Module) -> Iterator[tuple[Key, int]]:
    """All integers among a module's attributes, in lists, dicts and plain objects too."""
    for name, value in list(vars(module).items()):
        if name not in _OF_TORCH and not (isinstance(name, str) and name.startswith("__")):
            yield from _inside((name,), value, 3, set())


def _inside(key: Key, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[Key, int]]:
    if is_integer(value):
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


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy."""
    if isinstance(value, (bool, Tensor, torch.dtype)):
        return False
    return isinstance(value, int) or (
        type(value).__module__ == "numpy"
        and hasattr(value, "dtype")
        and value.dtype.kind in "iu"
        and value.ndim == 0
    )


def read(module: nn.Module, key: Key) -> Any:
    """The value at a key."""
    value: Any = getattr(module, key[0])
    for name in key[1:]:
        value = _item(value, name)
    return value


def write(module: nn.Module, key: Key, value: Any) -> None:
    """Replace the value at a key by one of the same type."""
    name, *rest = key
    old = getattr(module, name)
    if rest:
        value = _with(old, tuple(rest), value)
        if value is old:
            return
    elif type(old).__module__ == "numpy":
        value = type(old)(value)
    setattr(module, name, value)


def identity(module: nn.Module, key: Key) -> tuple[int, Any]:
    """An equal value for all keys that lead to the same integer of a shared object."""
    value: Any = module
    owner, rest = id(module), key
    for depth, name in enumerate(key[:-1]):
        value = getattr(value, name) if depth == 0 else _item(value, name)
        if not isinstance(value, tuple):
            owner, rest = id(value), key[depth + 1 :]
    return owner, rest


def as_code(key: Key) -> str:
    """A key as it is written in code, such as `sizes[0]`."""
    return str(key[0]) + "".join(
        name if isinstance(name, str) and name.startswith(".") else f"[{name!r}]"
        for name in key[1:]
    )


def _item(value: Any, name: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        return value[name]
    return getattr(value, name[1:])


def _with(value: Any, key: Key, new: Any) -> Any:
    """A container with another value at a key; changed in place unless it is a tuple."""
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
