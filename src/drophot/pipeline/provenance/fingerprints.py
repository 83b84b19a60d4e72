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
import logging
import os
import random
import re
import sys
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
from drophot.pipeline.provenance.digests import digest, digest_of, text_of

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
_BLIND = ("open", "globals", "eval", "exec")  # built-ins that read what code does not show
_MODULE = vars(nn.Module()).keys()
# The methods of an object that an experiment calls.
_CALLED = ("__call__", "__getitem__", "__getitems__", "forward")


def unseen(thing: Any) -> list[str]:
    """What code reads in ways that nothing compares.

    Args:
        thing: A factory or a function.

    Returns:
        "what `fit` reads by `open`", likewise others; each once.
    """
    reader = _Reader(data=False)
    reader.value(thing)
    return list(dict.fromkeys(reader.unseen))


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
        self.data, self.unknown, self.unseen = data, list[str](), list[str]()
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

    def _array(self, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            if array.dtype.hasobject:
                return self.value(array.tolist())
            if isinstance(array, np.ma.MaskedArray):
                kept, mask = array.filled(0), np.ma.getmaskarray(array)
                return {
                    "masked": [self.value(kept), self.value(mask), self.value(array.fill_value)]
                }
            sort, size = f"{array.dtype}", array.nbytes
            if self.data and size > _MANY:
                flat = array.reshape(-1)
                starts = range(0, len(flat), max(1, len(flat) // _PARTS))
                array = np.concatenate([flat[i : i + 1024] for i in starts])
            found = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()[:16]
            return {"array": f"{sort} {list(array.shape)}", "digest": found}
        shape = f"{array.dtype} {list(array.shape)}"
        if array.device.type != "meta" and (parts := _parts(array)):
            return {"tensor": shape, "layout": str(array.layout), "parts": self.value(parts)}
        if array.device.type != "meta" and (array.layout != torch.strided or array.is_quantized):
            return self._unknown(array)
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
        name, code = stable_name(function), function.__code__
        if is_installed(function.__module__) and lookup_by_name(function) is function:
            return name
        found: dict[str, Any] = {"function": name}
        used = _used_up([code])
        for where, values in (
            ("defaults", _defaults(function)),
            ("closure", _closure(function)),
            ("attributes", {k: v for k, v in vars(function).items() if not k.startswith("__")}),
        ):
            values = {name: used(name, v) for name, v in sorted(values.items())}
            values = {name: v for name, v in values.items() if v is not _MISSING}
            if values:
                found[where] = {n: self.part(f"{where}.{n}", v) for n, v in values.items()}
        if not is_installed_file(code.co_filename):
            plain, others = self._globals(function, used)
            if plain:
                found["globals"] = _brief(plain, len(plain))
            found["code"] = digest_of([self._code(code, function.__doc__), others])
        return found

    def _code(self, code: types.CodeType, docstring: str | None = None) -> Any:
        found, constants = bytecode.content(code, docstring)
        return [*found, [self.value(constant) for constant in constants]]

    def _globals(
        self, function: types.FunctionType, used: Callable[[str, Any], Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The globals that a function uses: numbers and words, to be read, and all others."""
        plain: dict[str, Any] = {}
        found: dict[str, Any] = {}
        code, package = function.__code__, function.__globals__.get("__package__")
        local: dict[str, Any] = {}
        for module, name, variable in bytecode.imports(code):
            if not is_user_module(module, name, package) and module not in ("os", "sys"):
                continue  # in the code by its name, loaded or not yet
            value = resolve_import(module, name, package)
            if value is None:
                found[f"import {module} {name}"] = "nothing"
            elif name is None and variable == module.partition(".")[0]:
                value = sys.modules.get(module.partition(".")[0], value)  # `import a.b` stores a
            if variable is not None and value is not None:
                local[variable] = value
        loads = {load.chain: load for load in bytecode.chains(code, frozenset(local))}
        for chain in sorted(loads):
            value = local.get(chain[0], function.__globals__.get(chain[0], _MISSING))
            if value is _MISSING and chain[0] in _BLIND:
                self.unseen.append(f"what `{function.__qualname__}` reads by `{chain[0]}`")
            if value is _MISSING or chain[0] == "__name__":
                continue  # a built-in, or what is not there yet; "__main__" or not, as it runs
            if (value := used(chain[0], value)) is _MISSING:
                continue  # a log or a counter
            taken = 1
            while taken < len(chain) and (part := _attribute(value, chain[taken])) is not _MISSING:
                installed = isinstance(value, types.ModuleType) and is_installed(value.__name__)
                value, taken = part, taken + 1
                if value is sys.argv or value is os.environ:
                    break
                if installed and not isinstance(value, _NAMED_BY_MODULE):
                    value = _OF_LIBRARY  # sys.stdout: not of the experiment
                    break
            name = ".".join(chain[:taken])
            if value is _OF_LIBRARY or value is os.environ:
                continue
            if value is sys.argv or "ArgumentParser" in chain:
                plain["sys.argv"] = self.value(sys.argv[1:])
            elif value is None or isinstance(value, _PLAIN):
                plain[name] = self.value(value)
            elif name not in found:
                found[name] = self.part(f"globals.{name}", value)
        for load in bytecode.chains(code, frozenset(local)):
            for key in _variables(load, local, function.__globals__):
                value = digest_of(os.environ.get(key))  # it may be a secret
                plain[f"environment.{key}"] = value
        return plain, found

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
        return {"module": module.__name__, "code": digest_of([self._code(code), self.value(uses)])}

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
    (logging.Logger, lambda _, __: "a logger"),
    (type(os.environ), lambda _, __: "os.environ"),
    (type(lru_cache(_MISSING.__eq__)), _Reader.wrapped),
)


def _lasting(thing: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An object's attributes, but for those that it fills or counts up while it is used."""
    methods = [getattr(type(thing), name, None) for name in _CALLED]
    used = _used_up([m.__code__ for m in methods if isinstance(m, types.FunctionType)])
    empty = _MODULE if isinstance(thing, nn.Module) else ()
    kept = {name: used(f"self.{name}", value) for name, value in state.items()}
    return {
        name: value
        for name, value in kept.items()
        if value is not _MISSING and not (name in empty and not value)
    }


def _used_up(codes: list[types.CodeType]) -> Callable[[str, Any], Any]:
    """What is under a name without what code fills or counts up: a log, a cache or a counter."""
    fills = [bytecode.filled(code) for code in codes]
    counted = {name for code in codes for name in bytecode.counted(code)}

    def used(name: str, value: Any) -> Any:
        if name in counted and type(value) is int:
            return _MISSING
        found = [by_name[name] for by_name in fills if name in by_name]
        written = {key for one in found for key in one.written}
        others = any(one.others for one in found)
        if not isinstance(value, _CONTAINERS) or not (written or others):
            return value
        if not isinstance(value, dict):
            return _MISSING
        read = {key for one in found for key in one.read}
        kept = {k: v for k, v in value.items() if k not in written and (not others or k in read)}
        return kept or _MISSING

    return used


def _variables(load: bytecode.Load, local: dict[str, Any], names: dict[str, Any]) -> list[str]:
    """The environment's variables that a load reads: `os.environ["A"]`, `"A" in environ`."""
    value, rest = local.get(load.chain[0], names.get(load.chain[0])), list(load.chain[1:])
    if value is os and rest:
        value = getattr(os, rest.pop(0), None)
    reads = value is os.getenv or (value is os.environ and (rest == ["get"] or load.gets))
    if reads and not load.sets:
        return [load.after] if isinstance(load.after, str) else []
    inside = value is os.environ and not rest and isinstance(load.before, str)
    return [str(load.before)] if inside else []


def _parts(tensor: Tensor) -> list[Any]:
    """The tensors that a sparse or a quantised tensor consists of; nothing of any other."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if not tensor.is_quantized:
        return []
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.int_repr(), tensor.q_scale(), tensor.q_zero_point()]
    scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return [tensor.int_repr(), scales, zeros, tensor.q_per_channel_axis()]


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
