"""The values that a function depends on: defaults, its closure, and the globals that it uses."""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from drophot._core.installed_packages import is_installed, is_user_module, resolve_import
from drophot.pipeline.provenance import bytecode
from drophot.pipeline.provenance.accumulators import MISSING
from drophot.pipeline.provenance.digests import digest_of

PLAIN = (bool, int, float, str)
_OF_LIBRARY = object()
_NAMED_BY_MODULE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
_OPAQUE = ("open", "globals", "eval", "exec")  # built-ins that read what code does not show


class Reader(Protocol):
    """Describes the values that a function depends on."""

    unseen: list[str]
    """Reads by code that cannot be compared."""

    def value(self, thing: Any) -> Any: ...

    def part(self, name: str, thing: Any) -> Any: ...


def defaults_of(function: types.FunctionType) -> dict[str, Any]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return dict(zip(names, values, strict=True)) | (function.__kwdefaults__ or {})


def closure_of(function: types.FunctionType) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # of a variable that has no value yet
            found[name] = cell.cell_contents
    return found


def globals_of(
    reader: Reader, function: types.FunctionType, rest: Callable[[str, Any], Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The globals that a function uses: numbers and words, to be read, and all others.

    `rest` leaves logs and counters out, see `without_accumulated`.
    """
    plain: dict[str, Any] = {}
    found: dict[str, Any] = {}
    code = function.__code__
    local = _imports(function, found)
    loads = {load.chain: load for load in bytecode.chains(code, frozenset(local))}
    for chain in sorted(loads):
        value = local.get(chain[0], function.__globals__.get(chain[0], MISSING))
        if value is MISSING and chain[0] in _OPAQUE:
            reader.unseen.append(f"what `{function.__qualname__}` reads by `{chain[0]}`")
        if value is MISSING or chain[0] == "__name__":
            continue  # a built-in or not defined yet; `__name__` depends on how the script runs
        if (value := rest(chain[0], value)) is MISSING:
            continue  # a log or a counter
        value, taken = _follow(value, chain)
        name = ".".join(chain[:taken])
        if value is _OF_LIBRARY or value is os.environ:
            continue
        if value is sys.argv or "ArgumentParser" in chain:
            plain["sys.argv"] = reader.value(sys.argv[1:])
        elif value is None or isinstance(value, PLAIN):
            plain[name] = reader.value(value)
        elif name not in found:
            found[name] = reader.part(f"globals.{name}", value)
    for load in bytecode.chains(code, frozenset(local)):
        for key in _environment_variables(load, local, function.__globals__):
            value = digest_of(os.environ.get(key))  # it may be a secret
            plain[f"environment.{key}"] = value
    return plain, found


def _imports(function: types.FunctionType, found: dict[str, Any]) -> dict[str, Any]:
    """The variables that the imports inside a function set; failed imports are added to `found`."""
    package: str | None = function.__globals__.get("__package__")
    local: dict[str, Any] = {}
    for module, name, variable in bytecode.imports(function.__code__):
        if not is_user_module(module, name, package) and module not in ("os", "sys"):
            continue  # in the code by its name, loaded or not yet
        value = resolve_import(module, name, package)
        if value is None:
            found[f"import {module} {name}"] = "nothing"
        elif name is None and variable == module.partition(".")[0]:
            value = sys.modules.get(module.partition(".")[0], value)  # `import a.b` stores a
        if variable is not None and value is not None:
            local[variable] = value
    return local


def _follow(value: Any, chain: tuple[str, ...]) -> tuple[Any, int]:
    """The value of an attribute chain as far as it can be followed, and how far that is."""
    taken = 1
    while taken < len(chain) and (part := _attribute(value, chain[taken])) is not MISSING:
        installed = isinstance(value, types.ModuleType) and is_installed(value.__name__)
        value, taken = part, taken + 1
        if value is sys.argv or value is os.environ:
            break
        if installed and not isinstance(value, _NAMED_BY_MODULE):
            return _OF_LIBRARY, taken  # such as sys.stdout: not part of the experiment
    return value, taken


def _attribute(value: Any, name: str) -> Any:
    """The value of `value.name`, if code reads nothing else of `value`."""
    if isinstance(value, types.ModuleType):
        return getattr(value, name, MISSING)
    if isinstance(value, type):
        found = inspect.getattr_static(value, name, MISSING)
        return found if found is None or isinstance(found, PLAIN) else MISSING
    return getattr(value, "__dict__", {}).get(name, MISSING)


def _environment_variables(
    load: bytecode.Load, local: dict[str, Any], names: dict[str, Any]
) -> list[str]:
    """The environment variables that a load reads: `os.environ["A"]`, `"A" in environ`."""
    value, rest = local.get(load.chain[0], names.get(load.chain[0])), list(load.chain[1:])
    if value is os and rest:
        value = getattr(os, rest.pop(0), None)
    reads = value is os.getenv or (value is os.environ and (rest == ["get"] or load.gets))
    if reads and not load.sets:
        return [load.after] if isinstance(load.after, str) else []
    inside = value is os.environ and not rest and isinstance(load.before, str)
    return [str(load.before)] if inside else []
