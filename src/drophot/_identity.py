"""What two processes can compare of a thing: its code, settings and numbers, as JSON can hold them.

Nothing in it changes from one process to the next: no address, no order of a set, no temporary
path. What is installed (torch, and all other packages) goes by name and version, what is the
user's own by its code: bytecode, constants, defaults, the values of its closure and of the globals
that it uses. Objects go by type and by what pickle would keep of them, arrays by their digest.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import re
import tempfile
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property, lru_cache, partial
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drophot import _code
from drophot._digests import digest, digest_of, text_of
from drophot._packages import (
    file_of_user,
    is_installed,
    is_installed_file,
    named,
    of_name,
    versioned,
)

_LONG = 400  # characters of JSON, beyond which a digest stands for a value
_MANY = 1 << 30  # bytes of an array that is not in memory, beyond which parts of it are hashed
_PARTS = 1024
_DEEP = 60  # attributes of attributes
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_PLAIN = (bool, int, float, str)
_CONTAINERS = (list, dict, set, deque)
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod, property)
_MISSING, _OF_LIBRARY = object(), object()
_NAMED_BY_MODULE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
_MODULE = vars(nn.Module()).keys()
# The methods of an object that an experiment calls.
_CALLED = ("__call__", "__getitem__", "__getitems__", "forward")


def describe(thing: Any, *, data: bool = False) -> tuple[Any, list[str]]:
    """A thing as JSON, equal if and only if the thing is, as far as that can be known.

    Args:
        thing: A factory, a function, an object: anything.
        data: Whether it is a data set, of which samples are compared as well. Folders and the
            state of its random generators are then left out.

    Returns:
        The description; what could not be looked into, each as "a TextIOWrapper in `closure.log`".
    """
    reader = _Reader(data)
    return reader.value(thing), reader.unknown


def attributes(thing: Any, *, data: bool = False) -> dict[str, Any]:
    """An object's attributes, each by itself, but for what it fills or counts up while it is used.

    Args:
        thing: Any object.
        data: As for `describe`.

    Returns:
        Their descriptions by name.
    """
    own = getattr(thing, "__dict__", {})
    return {name: describe(value, data=data)[0] for name, value in _lasting(thing, own).items()}


class _Reader:
    """Goes through a thing once, and takes down what could not be looked into."""

    def __init__(self, data: bool) -> None:
        self.data, self.unknown = data, list[str]()
        self.seen: dict[int, tuple[int, Any]] = {}  # keeps them alive: an id belongs to one thing
        self.count = 0
        self.path: list[str] = []

    def value(self, thing: Any) -> Any:
        kind = type(thing)
        if thing is None or kind in (bool, int):
            return thing
        if kind is float:
            return thing if isfinite(thing) else repr(thing)
        if kind is str:
            return self._string(thing)
        if isinstance(thing, Tensor | np.ndarray):
            return self._array(thing)
        if isinstance(thing, np.generic):
            return self.value(thing.item()) if type(thing.item()) is not kind else repr(thing)
        if isinstance(thing, PurePath):
            return self._string(str(thing))
        if kind in (bytes, bytearray):
            return {"bytes": len(thing), "digest": hashlib.sha256(thing).hexdigest()[:16]}
        if kind in (complex, range, type(...), type(NotImplemented), *_NAMED):
            return repr(thing)
        if id(thing) in self.seen:
            return {"again": self.seen[id(thing)][0]}
        if kind in (list, tuple, dict, set, frozenset, OrderedDict, types.MappingProxyType):
            self._remember(thing)
            found = self._container(thing)
            del self.seen[id(thing)]  # described wherever it is, but not within itself
            return found
        if len(self.path) > _DEEP:
            return self._unknown(thing)
        self._remember(thing)
        readers = (*_READERS, (_generators(), _Reader.random))
        read = next((read for kinds, read in readers if isinstance(thing, kinds)), _Reader._object)
        found = read(self, thing)
        if isinstance(found, str):  # as short as "again"
            del self.seen[id(thing)]
        return found

    def part(self, name: str, thing: Any) -> Any:
        """A part of what is being described, for the path of what is unknown."""
        self.path.append(name)
        try:
            return self.value(thing)
        finally:
            self.path.pop()

    def _unknown(self, thing: Any) -> Any:
        where = f" as `{'.'.join(self.path)}`" if self.path else ""
        self.unknown.append(f"{named(type(thing))}{where}")
        return {"unknown": named(type(thing))}

    def _remember(self, thing: Any) -> None:
        self.count += 1
        self.seen[id(thing)] = self.count, thing

    def _string(self, text: str) -> str:
        if "/" in text or "\\" in text:
            path = Path(text)
            if not _temporary().isdisjoint((path, *path.parents)):
                return "a temporary path"
            if self.data and path.is_absolute():
                return path.name if path.suffix else "a folder"
        return text if len(text) <= _LONG else f"{text[:20]}… {digest_of(text)}"

    def _array(self, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            if array.dtype.hasobject:
                return self.value(array.tolist())
            sort, size = f"{array.dtype}", array.nbytes
            if self.data and size > _MANY:
                flat = array.reshape(-1)
                starts = range(0, len(flat), max(1, len(flat) // _PARTS))
                array = np.concatenate([flat[i : i + 1024] for i in starts])
            found = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()[:16]
            return {"array": f"{sort} {list(array.shape)}", "digest": found}
        shape = f"{array.dtype} {list(array.shape)}"
        if array.layout != torch.strided or array.is_quantized or array.device.type == "meta":
            return {"tensor": shape, "digest": str(array.layout)}
        if array.numel() == 1 and not array.is_complex():
            return {"tensor": shape, "value": self.value(array.item())}
        if self.data and array.nbytes > _MANY and array.is_contiguous():
            flat = array.detach().reshape(-1)
            array = torch.cat([
                flat[i : i + 1024] for i in range(0, len(flat), len(flat) // _PARTS)
            ])
        return {"tensor": shape, "digest": digest([array])}

    def _container(self, thing: Any) -> Any:
        if len(thing) > 1000:
            try:  # long lists of plain values, in C
                found = json.dumps(thing, sort_keys=True)
            except (TypeError, ValueError):
                pass
            else:
                if self.data:  # the same files in another folder
                    found = re.sub(r'"/(?:[^"\\]|\\.)*/', '"', found)
                return {"items": len(thing), "digest": digest_of(found)}
        if isinstance(thing, set | frozenset):
            return _brief(sorted((self.value(item) for item in thing), key=text_of), len(thing))
        if not isinstance(thing, dict | types.MappingProxyType):
            return _brief([self.part(str(i), item) for i, item in enumerate(thing)], len(thing))
        if all(type(key) is str for key in thing):
            pairs: Any = {key: self.part(key, thing[key]) for key in sorted(thing)}
        else:
            pairs = sorted(([self.value(k), self.value(v)] for k, v in thing.items()), key=text_of)
        return _brief(pairs, len(thing))

    def function(self, function: types.FunctionType) -> Any:
        name, code = versioned(function), function.__code__
        if is_installed(function.__module__) and of_name(function) is function:
            return name
        found: dict[str, Any] = {"function": name}
        used = _used_up([code])
        for where, values in (
            ("defaults", _defaults(function)),
            ("closure", _closure(function)),
            ("attributes", {k: v for k, v in vars(function).items() if not k.startswith("__")}),
        ):
            values = {name: v for name, v in sorted(values.items()) if not used(name, v)}
            if values:
                found[where] = {n: self.part(f"{where}.{n}", v) for n, v in values.items()}
        if not is_installed_file(code.co_filename):
            plain, others = self._globals(function, used)
            if plain:
                found["globals"] = _brief(plain, len(plain))
            found["code"] = digest_of([self._code(code, function.__doc__), others])
        return found

    def _code(self, code: types.CodeType, docstring: str | None = None) -> Any:
        found, constants = _code.content(code, docstring)
        return [*found, [self.value(constant) for constant in constants]]

    def _globals(
        self, function: types.FunctionType, used: Callable[[str, Any], bool]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The globals that a function uses: numbers and words, to be read, and all others."""
        plain: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for chain in sorted(set(_code.chains(function.__code__))):
            value = function.__globals__.get(chain[0], _MISSING)
            if value is _MISSING or used(chain[0], value):
                continue  # a built-in, or what is not there yet; a log or a counter
            taken = 1
            while taken < len(chain) and (part := _attribute(value, chain[taken])) is not _MISSING:
                installed = isinstance(value, types.ModuleType) and is_installed(value.__name__)
                value, taken = part, taken + 1
                if installed and not isinstance(value, _NAMED_BY_MODULE):
                    value = _OF_LIBRARY  # os.environ, sys.stdout: not of the experiment
                    break
            name = ".".join(chain[:taken])
            if value is _OF_LIBRARY:
                continue
            if value is None or isinstance(value, _PLAIN):
                plain[name] = self.value(value)
            elif name not in found:
                found[name] = self.part(f"globals.{name}", value)
        for name in sorted(set(_code.imports(function.__code__))):
            if file := file_of_user(name, function.__globals__.get("__package__")):
                found[f"import {name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        return plain, found

    def type(self, cls: type) -> Any:
        if is_installed(cls.__module__):
            return versioned(cls)
        parts = {
            name: self.part(name, member)
            for name, member in sorted(vars(cls).items())
            if name != "_abc_impl"
            and (isinstance(member, _FUNCTIONS) or not name.startswith("__") or name == "__slots__")
        }
        bases = [self.value(base) for base in cls.__bases__ if base is not object]
        return {"class": named(cls), "code": digest_of([bases, parts])}

    def partial(self, call: partial[Any]) -> Any:
        arguments = {str(i): a for i, a in enumerate(call.args)} | call.keywords
        found = {name: self.part(name, arguments[name]) for name in arguments}
        return {"call": self.value(call.func), **({"with": found} if found else {})}

    def method(self, method: types.MethodType) -> Any:
        if _is_global(method.__self__):
            return named(method)
        return {"method": self.value(method.__func__), "of": self.value(method.__self__)}

    def builtin(self, function: types.BuiltinFunctionType) -> Any:
        owner = function.__self__
        if _is_global(owner):
            return named(function)
        if owner is None or isinstance(owner, types.ModuleType | type):
            where = owner.__name__ if owner is not None else function.__module__
            return f"{where}.{function.__name__}"
        return {"method": function.__name__, "of": self.value(owner)}

    def descriptor(self, thing: Any) -> Any:
        return f"{named(thing.__objclass__)}.{thing.__name__}"

    def module(self, module: types.ModuleType) -> Any:
        if file := file_of_user(module.__name__, None):
            content = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            return {"module": module.__name__, "code": content}
        return {"module": module.__name__}

    def random(self, generator: Any) -> Any:
        if self.data or _is_global(generator):
            return {"random": named(type(generator))}
        if isinstance(generator, torch.Generator):
            return {"generator": str(generator.device), "seed": generator.initial_seed()}
        return self._object(generator)

    def wrapped(self, thing: Any) -> Any:
        """A property, a static method and the like: the functions in it."""
        names = ("__func__", "func", "__wrapped__", "fget", "fset", "fdel")
        parts = [getattr(thing, name, None) for name in names]
        return [type(thing).__name__, *(self.value(part) for part in parts if part is not None)]

    def _object(self, thing: Any) -> Any:
        kind = type(thing)
        found: dict[str, Any] = {"object": self.value(kind)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reduced = thing.__reduce_ex__(4)
        except Exception:
            return self._unknown(thing)
        if isinstance(reduced, str):
            return found | {"name": reduced}
        make, arguments, state, items, pairs, *_ = (*reduced, None, None, None)
        plain = getattr(make, "__name__", "") in ("__newobj__", "__newobj_ex__", "_reconstructor")
        if not plain:
            found["call"] = self.value(make)
        if rest := [a for a in arguments if a is not kind and not (plain and a is object)]:
            found["with"] = self.value(rest)
        slots = state[1] if isinstance(state, tuple) and len(state) == 2 else None
        state = (state[0] or {}) | slots if isinstance(slots, dict) else state
        if isinstance(state, dict) and all(type(name) is str for name in state):
            state = _lasting(thing, state)
        for name, value in (("state", state), ("items", items), ("pairs", pairs)):
            if value is not None and value != {}:
                value = list(value) if name != "state" else value
                found[name] = self.value(value)
        return found


_READERS: tuple[tuple[Any, Callable[[_Reader, Any], Any]], ...] = (
    (types.FunctionType, _Reader.function),
    (type, _Reader.type),
    (partial, _Reader.partial),
    (types.MethodType, _Reader.method),
    (types.BuiltinFunctionType, _Reader.builtin),
    ((types.MethodDescriptorType, types.WrapperDescriptorType), _Reader.descriptor),
    ((types.MemberDescriptorType, types.GetSetDescriptorType), _Reader.descriptor),
    (types.ModuleType, _Reader.module),
    (types.CodeType, _Reader._code),
    ((property, staticmethod, classmethod, cached_property), _Reader.wrapped),
    (type(os.environ), lambda _, __: "os.environ"),
    (type(lru_cache(_MISSING.__eq__)), _Reader.wrapped),
)


def _lasting(thing: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An object's attributes, but for those that it fills or counts up while it is used."""
    methods = [getattr(type(thing), name, None) for name in _CALLED]
    used = _used_up([m.__code__ for m in methods if isinstance(m, types.FunctionType)])
    empty = _MODULE if isinstance(thing, nn.Module) else ()
    return {
        name: value
        for name, value in state.items()
        if not used(f"self.{name}", value) and not (name in empty and not value)
    }


def _used_up(codes: list[types.CodeType]) -> Callable[[str, Any], bool]:
    """Whether code fills or counts up what is under a name: a log, a cache or a counter."""
    filled = {name for code in codes for name in _code.filled(code)}
    counted = {name for code in codes for name in _code.counted(code)}

    def used(name: str, value: Any) -> bool:
        filling = name in filled and isinstance(value, _CONTAINERS)
        return filling or (name in counted and type(value) is int)

    return used


def _is_global(owner: Any) -> bool:
    """Whether it is a generator whose methods are functions of Python's or NumPy's module."""
    return owner is random.random.__self__ or owner is np.random.rand.__self__


@cache
def _generators() -> tuple[type, ...]:  # NumPy loads its own when they are asked for
    return torch.Generator, random.Random, np.random.Generator, np.random.RandomState


def _brief(tree: Any, items: int) -> Any:
    """A container, or where that would be long its digest."""
    return tree if len(text_of(tree)) <= _LONG else {"items": items, "digest": digest_of(tree)}


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return dict(zip(names, values, strict=True)) | (function.__kwdefaults__ or {})


def _closure(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # of a variable that has no value yet
            found[name] = cell.cell_contents
    return found


def _attribute(value: Any, name: str) -> Any:
    """What `value.name` is, where that is all that code takes of `value`."""
    if isinstance(value, types.ModuleType):
        return getattr(value, name, _MISSING)
    if isinstance(value, type):
        found = inspect.getattr_static(value, name, _MISSING)
        return found if found is None or isinstance(found, _PLAIN) else _MISSING
    return getattr(value, "__dict__", {}).get(name, _MISSING)


@cache
def _temporary() -> set[Path]:
    folder = Path(tempfile.gettempdir())
    return {folder, folder.resolve()}
