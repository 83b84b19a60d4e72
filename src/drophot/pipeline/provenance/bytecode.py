"""The bytecode of functions and the outside names that they use, equal in every process.

Bytecode also covers lambdas, functions in a notebook, and files that were edited after they were
loaded. It does not change between patch releases of Python, and it contains no line numbers, file
names or addresses.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType
from typing import Any, cast

_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_CELL = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_SIMPLE = (*("LOAD_FAST", "LOAD_CONST", "LOAD_GLOBAL", "LOAD_DEREF"), "LOAD_SMALL_INT")
_HAS_DOCSTRING = 0x4000000
# Methods that fill a container: what they are called on is a log or a cache.
_FILLS = {"append", "appendleft", "extend", "insert", "add", "update", "setdefault"}


def content(code: CodeType, docstring: str | None = None) -> tuple[list[Any], list[Any]]:
    """The instructions and names of a code object as JSON can hold them, and its constants.

    The docstring is left out of the constants.
    """
    constants = list(code.co_consts)
    if docstring is not None and constants and constants[0] == docstring:
        constants[0] = None
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    flags = code.co_flags & ~_HAS_DOCSTRING
    found: list[Any] = [code.co_code.hex(), code.co_exceptiontable.hex(), flags, *counts]
    return [*found, *(list(group) for group in names)], constants


@dataclass(frozen=True, slots=True)
class Load:
    """A name that code reads."""

    chain: tuple[str, ...]
    """The name and the attributes that are read from it."""
    before: Any
    """The constant that is loaded right before it, if any."""
    after: Any
    """The constant that is loaded right after it, if any: a key or an argument."""
    gets: bool
    """Whether `after` is a key whose value is read."""
    sets: bool
    """Whether an item of the result is set."""


@dataclass(frozen=True, slots=True)
class Fills:
    """How code fills a container."""

    written: set[Any] = field(default_factory=set[Any])
    """The constant keys that it writes."""
    read: set[Any] = field(default_factory=set[Any])
    """The constant keys that it reads."""
    others: set[bool] = field(default_factory=set[bool])
    """Whether it writes other keys, or appends."""


def chains(code: CodeType, local: frozenset[str] = frozenset()) -> Iterator[Load]:
    """The globals that code and the functions inside it read, with the attributes read from them.

    `config.lr` is a load of `("config", "lr")`. `local` are names that the code imports itself.
    """
    for _, load in _loads(code, _GLOBAL):
        yield load
    for _, load in _loads(code, {"LOAD_FAST", *_CELL}) if local else ():
        if load.chain[0] in local:
            yield load


def imports(code: CodeType) -> Iterator[tuple[str, str | None, str | None]]:
    """The imports that code makes when it runs, those of functions inside it included.

    Yields the module's name (a relative one with leading dots), the name that is imported from it,
    and the variable, each of the last two if there is one. `import a.b` is ("a.b", None, "a").
    """
    for part in _parts(code):
        found = list(dis.get_instructions(part))
        module, taken = "", None
        for position, instruction in enumerate(found):
            kind = instruction.opname
            if kind not in ("IMPORT_NAME", "IMPORT_FROM"):
                continue
            follows = [i for i in found[position + 1 : position + 3] if i.opname != "SWAP"]
            stored = follows and follows[0].opname.startswith("STORE_")
            variable = follows[0].argval if stored else None
            if type(variable) is tuple:  # two instructions in one
                variable = cast(tuple[Any, ...], variable)[0]
            if kind == "IMPORT_FROM":
                yield module, instruction.argval if taken else None, variable
                continue
            taken = position and found[position - 1].argval  # nothing by `import a.b as c`
            level = found[position - 2].argval if position > 1 else 0
            module = "." * (level if isinstance(level, int) else 0) + instruction.argval
            yield module, None, variable


@lru_cache(maxsize=1024)
def filled(code: CodeType) -> dict[str, Fills]:
    """The globals, closure variables and attributes of `self` that code appends or writes to.

    Maps their names, attributes as `"self.name"`, to how they are filled.
    """
    found: dict[str, Fills] = {}
    for part, load in _loads(code, _GLOBAL | _CELL | {"LOAD_FAST"}):
        name, *attributes = load.chain
        if part.co_argcount and name == part.co_varnames[0] and attributes:
            name = f"self.{attributes.pop(0)}"
        fills = found.setdefault(name, Fills())
        by_key = load.sets and not attributes
        if attributes == ["setdefault"] or by_key:
            if load.after is None:
                fills.others.add(True)
            else:
                fills.written.add(load.after)
        elif attributes[:1] and attributes[0] in _FILLS:
            fills.others.add(True)
        elif load.after is not None and (load.gets or attributes == ["get"]):
            fills.read.add(load.after)
    return found


@lru_cache(maxsize=1024)
def counted(code: CodeType) -> set[str]:
    """The globals, closure variables and attributes (`"self.name"`) that code adds to by `+=`."""
    found: set[str] = set()
    for part in _parts(code):
        added = False
        for instruction in dis.get_instructions(part):
            if instruction.opname == "BINARY_OP":
                added = instruction.argrepr == "+="
            elif added and instruction.opname in ("STORE_GLOBAL", "STORE_DEREF"):
                found.add(instruction.argval)
            elif added and instruction.opname == "STORE_ATTR":
                found.add(f"self.{instruction.argval}")
            if instruction.opname not in ("BINARY_OP", "SWAP"):
                added = False
    return found


def _loads(code: CodeType, names: set[str]) -> Iterator[tuple[CodeType, Load]]:
    """The loads of some names, each with the code object that contains it."""
    for part in _parts(code):
        found = list(dis.get_instructions(part))
        for position, instruction in enumerate(found):
            name = instruction.opname.removesuffix("_BORROW")
            root = instruction.argval
            if type(root) is tuple and name.endswith("LOAD_FAST"):  # two instructions in one
                name, root = "LOAD_FAST", cast(tuple[Any, ...], root)[-1]
            if name not in names:
                continue
            chain, end = [str(cast(Any, root))], position + 1
            while end < len(found) and found[end].opname in _ATTRIBUTE:
                chain.append(found[end].argval)
                end += 1
            follows = [i for i in found[end : end + 3] if i.opname != "PUSH_NULL"][:2]
            then = follows[1].opname if len(follows) == 2 else ""
            simple = bool(follows) and follows[0].opname.removesuffix("_BORROW") in _SIMPLE
            gets = then == "BINARY_SUBSCR" or (then == "BINARY_OP" and follows[1].argrepr == "[]")
            yield (
                part,
                Load(
                    tuple(chain),
                    before=_constant(found[position - 1]) if position else None,
                    after=_constant(follows[0]) if follows else None,
                    gets=gets,
                    sets=simple and then in ("STORE_SUBSCR", "COPY"),  # = or +=
                ),
            )


def _constant(instruction: dis.Instruction) -> Any:
    """The constant that an instruction loads, if it can be a key: a string or an integer."""
    value = instruction.argval
    loads = instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT")
    return value if loads and isinstance(value, str | int) else None


def _parts(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
