"""A description of any object that two processes can compare, as JSON can hold it.

It contains nothing that changes from one process to the next: no address, no order of a set, no
temporary path. Installed code (torch and all other packages) is described by name and version. The
user's own is described by its bytecode, constants, defaults, and the values of its closure and of
the globals that it uses. Objects are described by their type and what pickle would keep of them,
arrays by a digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import tempfile
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from math import isfinite
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from drophot._core.installed_packages import (
    is_installed,
    is_installed_file,
    is_user_module,
    lookup_by_name,
    qualified_name,
    resolve_import,
    stable_name,
    user_source_file,
    versioned_name,
)
from drophot.pipeline.provenance import bytecode
from drophot.pipeline.provenance.accumulators import MISSING, without_accumulated
from drophot.pipeline.provenance.arrays import describe_ndarray, describe_tensor
from drophot.pipeline.provenance.digests import digest_of, text_of
from drophot.pipeline.provenance.function_parts import closure_of, defaults_of, globals_of

_LONG = 400  # characters of JSON, beyond which a digest replaces a value
_DEEP = 60  # attributes of attributes
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod, property)
MODULE_ATTRIBUTES = vars(nn.Module()).keys()
"""The attributes of every module: its parts and hooks."""
# The functions of an operator that was made by `torch.library.custom_op`.
_CUSTOM_OP = ("init", "setup_context", "backward")
# The methods of an object that an experiment calls.
_CALLED = ("__call__", "__getitem__", "__getitems__", "forward", "select")


def unseen(thing: Any) -> list[str]:
    """Reads by code that cannot be compared, such as "what `fit` reads by `open`"."""
    reader = _Reader(data=False)
    reader.value(thing)
    return list(dict.fromkeys(reader.unseen))


def describe(thing: Any, *, data: bool = False) -> tuple[Any, list[str]]:
    """An object as JSON can hold it, equal if and only if the object is, as far as can be known.

    With `data`, it is a dataset, of which samples are compared too: folders and the state of its
    random generators are left out. Also returns the parts that cannot be compared, such as
    "TextIOWrapper as `closure.log`".
    """
    reader = _Reader(data)
    return reader.value(thing), reader.unknown


def attributes(thing: Any, *, data: bool = False) -> dict[str, Any]:
    """The descriptions of an object's attributes, without its logs, caches and counters."""
    own = getattr(thing, "__dict__", {})
    return {name: describe(value, data=data)[0] for name, value in _lasting(thing, own).items()}


class _Reader:
    """Describes an object and collects the parts that cannot be compared."""

    def __init__(self, data: bool) -> None:
        self.data, self.unknown, self.unseen = data, list[str](), list[str]()
        self.seen: dict[int, tuple[int, Any]] = {}  # keeps them alive: an id belongs to one thing
        self.count = 0
        self.path: list[str] = []

    def value(self, thing: Any) -> Any:
        kind = cast(Any, type(thing))
        if thing is None or kind in (bool, int):
            return thing
        if kind is float:
            return thing if isfinite(thing) else repr(thing)
        if kind is str:
            return self._string(thing)
        if isinstance(thing, np.ndarray):
            return describe_ndarray(cast(Any, thing), self.data, self.value)
        if isinstance(thing, Tensor):
            found = describe_tensor(thing, self.data, self.value)
            return self._unknown(thing) if found is None else found
        if isinstance(thing, np.generic):
            plain = cast(Any, thing).item()
            return self.value(plain) if type(plain) is not kind else repr(cast(Any, thing))
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
        """Describe a part of an object; its name leads to the parts that cannot be compared."""
        self.path.append(name)
        try:
            return self.value(thing)
        finally:
            self.path.pop()

    def _unknown(self, thing: Any) -> Any:
        where = f" as `{'.'.join(self.path)}`" if self.path else ""
        self.unknown.append(f"{qualified_name(type(thing))}{where}")
        return {"unknown": qualified_name(type(thing))}

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
        kind = cast(Any, type(thing))
        if kind in (set, frozenset):
            return _brief(sorted((self.value(item) for item in thing), key=text_of), len(thing))
        if kind not in (dict, OrderedDict, types.MappingProxyType):
            return _brief([self.part(str(i), item) for i, item in enumerate(thing)], len(thing))
        if all(type(key) is str for key in thing):
            pairs: Any = {key: self.part(key, thing[key]) for key in sorted(thing)}
        else:
            pairs = sorted(([self.value(k), self.value(v)] for k, v in thing.items()), key=text_of)
        return _brief(pairs, len(thing))

    def function(self, function: types.FunctionType) -> Any:
        name, code = stable_name(function), function.__code__
        if is_installed(function.__module__) and lookup_by_name(function) is function:
            return name
        found: dict[str, Any] = {"function": name}
        rest = without_accumulated([code])
        for where, values in (
            ("defaults", defaults_of(function)),
            ("closure", closure_of(function)),
            ("attributes", {k: v for k, v in vars(function).items() if not k.startswith("__")}),
        ):
            values = {name: rest(name, v) for name, v in sorted(values.items())}
            values = {name: v for name, v in values.items() if v is not MISSING}
            if values:
                found[where] = {n: self.part(f"{where}.{n}", v) for n, v in values.items()}
        if not is_installed_file(code.co_filename):
            plain, others = globals_of(self, function, rest)
            if plain:
                found["globals"] = _brief(plain, len(plain))
            found["code"] = digest_of([self.code(code, function.__doc__), others])
        return found

    def code(self, code: types.CodeType, docstring: str | None = None) -> Any:
        found, constants = bytecode.content(code, docstring)
        return [*found, [self.value(constant) for constant in constants]]

    def type(self, cls: type) -> Any:
        if is_installed(cls.__module__):
            return versioned_name(cls)
        parts = {
            name: self.part(name, member)
            for name, member in sorted(vars(cls).items())
            if name != "_abc_impl"
            and (isinstance(member, _FUNCTIONS) or not name.startswith("__") or name == "__slots__")
        }
        bases = [self.value(base) for base in cls.__bases__ if base is not object]
        return {"class": cls.__qualname__, "code": digest_of([bases, parts])}

    def partial(self, call: partial[Any]) -> Any:
        arguments = {str(i): a for i, a in enumerate(call.args)} | call.keywords
        found = {name: self.part(name, arguments[name]) for name in arguments}
        return {"call": self.value(call.func), **({"with": found} if found else {})}

    def method(self, method: types.MethodType) -> Any:
        if _is_global(method.__self__):
            return qualified_name(method)
        return {"method": self.value(method.__func__), "of": self.value(method.__self__)}

    def builtin(self, function: types.BuiltinFunctionType) -> Any:
        owner = function.__self__
        if _is_global(owner):
            return qualified_name(function)
        if owner is None or isinstance(owner, types.ModuleType | type):
            where = owner.__name__ if owner is not None else function.__module__
            return f"{where}.{function.__name__}"
        return {"method": function.__name__, "of": self.value(owner)}

    def descriptor(self, thing: Any) -> Any:
        return f"{stable_name(thing.__objclass__)}.{thing.__name__}"

    def module(self, module: types.ModuleType) -> Any:
        file = user_source_file(module.__name__, None)
        if file is None or file.suffix != ".py":
            content = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file else "installed"
            return {"module": module.__name__, "code": content}
        code = compile(file.read_bytes(), "", "exec", dont_inherit=True, optimize=2)
        package = getattr(module, "__package__", None)
        uses = [
            resolve_import(where, name, package)
            for where, name, _ in bytecode.imports(code)
            if is_user_module(where, name, package)
        ]
        return {"module": module.__name__, "code": digest_of([self.code(code), self.value(uses)])}

    def operator(self, operator: Any) -> Any:
        """An operator of torch: its name, and the functions of one that was made by `custom_op`."""
        parts = (getattr(operator, f"_{one}_fn", None) for one in _CUSTOM_OP)
        name = getattr(operator, "_qualname", None) or str(operator)
        return [name, *(self.value(part) for part in parts if part is not None)]

    def random(self, generator: Any) -> Any:
        if self.data or _is_global(generator):
            return {"random": qualified_name(type(generator))}
        if isinstance(generator, torch.Generator):
            return {"generator": str(generator.device), "seed": generator.initial_seed()}
        return self._object(generator)

    def wrapped(self, thing: Any) -> Any:
        """A property, a static method and the like: the functions in it."""
        names = ("__func__", "func", "__wrapped__", "fget", "fset", "fdel")
        parts = [getattr(thing, name, None) for name in names]
        return [type(thing).__name__, *(self.value(part) for part in parts if part is not None)]

    def _object(self, thing: Any) -> Any:
        kind = cast(Any, type(thing))
        found: dict[str, Any] = {"object": self.value(kind)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reduced = thing.__reduce_ex__(4)
        except Exception:
            return self._unknown(thing)
        if isinstance(reduced, str):
            return found | {"name": reduced}
        parts: tuple[Any, ...] = (*reduced, None, None, None)
        make, arguments, state, items, pairs = parts[:5]
        plain = getattr(make, "__name__", "") in ("__newobj__", "__newobj_ex__", "_reconstructor")
        if not plain:
            found["call"] = self.value(make)
        if rest := [a for a in arguments if a is not kind and not (plain and a is object)]:
            found["with"] = self.value(rest)
        state = _attributes_in(state)
        if _has_names(state):
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
    (types.CodeType, _Reader.code),
    ((property, staticmethod, classmethod, cached_property), _Reader.wrapped),
    ((CustomOpDef, OpOverload, OpOverloadPacket), _Reader.operator),
    (logging.Logger, lambda _, __: "a logger"),
    (type(os.environ), lambda _, __: "os.environ"),
    (type(lru_cache(MISSING.__eq__)), _Reader.wrapped),
)


def _attributes_in(state: Any) -> Any:
    """The state of an object as pickle has it; with slots, both dictionaries in one."""
    if isinstance(state, tuple):
        parts = cast(tuple[Any, ...], state)
        if len(parts) == 2 and isinstance(parts[1], dict):
            return cast(Any, (parts[0] or {}) | parts[1])
        return parts
    return state


def _has_names(state: Any) -> bool:
    if not isinstance(state, dict):
        return False
    return all(type(name) is str for name in cast(dict[Any, Any], state))


def _lasting(thing: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An object's attributes without its logs, caches and counters."""
    methods = [getattr(cast(Any, type(thing)), name, None) for name in _CALLED]
    codes = [m.__code__ for m in methods if isinstance(m, types.FunctionType)]
    rest = without_accumulated(codes)
    empty = MODULE_ATTRIBUTES if isinstance(thing, nn.Module) else ()
    kept = {name: rest(f"self.{name}", value) for name, value in state.items()}
    return {
        name: value
        for name, value in kept.items()
        if value is not MISSING and not (name in empty and not value)
    }


def _is_global(owner: Any) -> bool:
    """Whether it is a generator whose methods are functions of the module `random`, or NumPy's."""
    return owner is random.random.__self__ or owner is np.random.rand.__self__


@cache
def _generators() -> tuple[type, ...]:  # NumPy loads its own when they are asked for
    return torch.Generator, random.Random, np.random.Generator, np.random.RandomState


def _brief(tree: Any, items: int) -> Any:
    """A container, or its digest if it is long."""
    return tree if len(text_of(tree)) <= _LONG else {"items": items, "digest": digest_of(tree)}


@cache
def _temporary() -> set[Path]:
    folder = Path(tempfile.gettempdir())
    return {folder, folder.resolve()}
