"""What a function's bytecode says and which outside names it uses, the same in every process.

The bytecode is what runs, so it also covers lambdas, functions of a notebook, and files that were
edited after they were loaded. It does not change between patch releases of Python, and it has no
line numbers, file names or addresses.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_CELL = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_SIMPLE = (*("LOAD_FAST", "LOAD_CONST", "LOAD_GLOBAL", "LOAD_DEREF"), "LOAD_SMALL_INT")
_HAS_DOCSTRING = 0x4000000
# Methods that fill a container: what they are called on is a log or a cache.
_FILLS = {"append", "appendleft", "extend", "insert", "add", "update", "setdefault"}


def content(code: CodeType, docstring: str | None = None) -> tuple[list[Any], list[Any]]:
    """What a code object does.

    Args:
        code: The code of a function, or of a function inside it.
        docstring: Left out.

    Returns:
        The instructions with their names, as JSON can hold them; the constants.
    """
    constants = list(code.co_consts)
    if docstring is not None and constants and constants[0] == docstring:
        constants[0] = None
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    flags = code.co_flags & ~_HAS_DOCSTRING
    found: list[Any] = [code.co_code.hex(), code.co_exceptiontable.hex(), flags, *counts]
    return [*found, *(list(group) for group in names)], constants


def chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """The globals that code reads, each with the attributes that it takes of it.

    Args:
        code: The code of a function; functions inside it count too.

    Yields:
        `("config", "lr")` for `config.lr`, likewise others.
    """
    for _, chain, _ in _loads(code, _GLOBAL):
        yield chain


def imports(code: CodeType) -> Iterator[str]:
    """The modules that code imports when it runs.

    Args:
        code: The code of a function; functions inside it count too.

    Yields:
        Their names, relative ones with leading dots.
    """
    for part in _parts(code):
        found = list(dis.get_instructions(part))
        for position, instruction in enumerate(found):
            if instruction.opname == "IMPORT_NAME":
                level = found[position - 2].argval if position > 1 else 0
                dots = level if isinstance(level, int) else 0
                yield "." * dots + instruction.argval


@lru_cache(maxsize=1024)
def filled(code: CodeType) -> set[str]:
    """The globals, variables of a closure and attributes of `self` that code appends or writes to.

    Args:
        code: The code of a function; functions inside it count too.

    Returns:
        Their names, attributes as `"self.name"`.
    """
    found: set[str] = set()
    for part, (root, *attributes), follows in _loads(code, _GLOBAL | _CELL | {"LOAD_FAST"}):
        name = root
        if part.co_argcount and root == part.co_varnames[0] and attributes:
            name = f"self.{attributes.pop(0)}"
        if attributes[:1] and attributes[0] in _FILLS:
            found.add(name)
        if not attributes and follows:
            found.add(name)
    return found


@lru_cache(maxsize=1024)
def counted(code: CodeType) -> set[str]:
    """The globals, variables of a closure and attributes that code adds to by `+=`.

    Args:
        code: The code of a function; functions inside it count too.

    Returns:
        Their names, attributes as `"self.name"`.
    """
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


def _loads(code: CodeType, names: set[str]) -> Iterator[tuple[CodeType, tuple[str, ...], bool]]:
    """Loads of names, their attributes, and whether an item of the result is set."""
    for part in _parts(code):
        found = list(dis.get_instructions(part))
        for position, instruction in enumerate(found):
            name = instruction.opname.removesuffix("_BORROW")
            root: Any = instruction.argval
            if isinstance(root, tuple) and name.endswith("LOAD_FAST"):  # two instructions in one
                name, root = "LOAD_FAST", root[-1]
            if name not in names:
                continue
            chain, end = [str(root)], position + 1
            while end < len(found) and found[end].opname in _ATTRIBUTE:
                chain.append(found[end].argval)
                end += 1
            after = [i.opname for i in found[end : end + 2]]
            sets = len(after) == 2 and after[1] in ("STORE_SUBSCR", "COPY")  # = or +=
            sets = sets and after[0].removesuffix("_BORROW") in _SIMPLE
            yield part, tuple(chain), sets


def _parts(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
