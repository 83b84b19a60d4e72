"""What is installed, and goes by name and version, and what is the user's own."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

# A configuration has the versions of these anyway.
_UNVERSIONED = ("torch", "drophot", "builtins", *sys.stdlib_module_names)


def qualified_name(thing: Any) -> str:
    """The qualified name of a function, a class or an object's class.

    Args:
        thing: Any of these.

    Returns:
        The name.
    """
    kind = thing if isinstance(getattr(thing, "__qualname__", None), str) else type(thing)
    module = getattr(kind, "__module__", None) or "builtins"
    return f"{module}.{kind.__qualname__}"


def minor_version(version: str) -> str:
    """The part of a version that a patch release leaves alone.

    Args:
        version: "2.6.1+cpu".

    Returns:
        "2.6".
    """
    return ".".join(version.partition("+")[0].split(".")[:2])


def lookup_by_name(thing: Any) -> Any:
    """What there is under a thing's own name.

    Args:
        thing: A function or a class.

    Returns:
        The thing itself, if it can be imported.
    """
    found: Any = sys.modules.get(thing.__module__)
    for name in thing.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


def is_installed(module: str | None) -> bool:
    """Whether a module is Python's, or was installed, and so is known by its version.

    Args:
        module: Its name.

    Returns:
        Whether it is.
    """
    top = (module or "builtins").partition(".")[0]
    if top in _UNVERSIONED:
        return True
    if top == "__main__":  # a user's script, even where a tool runs it
        return False
    file = getattr(sys.modules.get(module or "") or sys.modules.get(top), "__file__", None)
    return file is not None and is_installed_file(file)


@cache
def is_installed_file(file: str) -> bool:
    """The same of a file of code.

    Args:
        file: Its name, as code objects and modules have it.

    Returns:
        Whether it is Python's or was installed.
    """
    if file.startswith("<frozen") or {"site-packages", "dist-packages"} & {*PurePath(file).parts}:
        return True
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), Path(paths["platstdlib"])]
    folders += [Path(module.__file__ or "").parent for module in (torch, np)]
    folders.append(Path(__file__).parents[1])
    return any(PurePath(file).is_relative_to(folder) for folder in folders)


def versioned_name(thing: Any) -> str:
    """A thing's name, with the version of the package that it was installed by.

    Args:
        thing: A function or a class.

    Returns:
        "timm.models.resnet.resnet18 (timm 1.0)"; of torch, Python and the user the name alone.
    """
    name = qualified_name(thing)
    top = name.partition(".")[0]
    if top in _UNVERSIONED or not is_installed(getattr(thing, "__module__", None)):
        return name
    return f"{name} ({top} {version})" if (version := _version(top)) else name


@cache
def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return minor_version(metadata.version(package))
    return minor_version(str(getattr(sys.modules.get(package), "__version__", "")))


def resolve_import(module: str, name: str | None, package: str | None) -> Any:
    """What an import statement of a user's code gives; the user's own modules are imported for it.

    Args:
        module: The module's name, with leading dots if it is relative.
        name: What is taken from it, if anything.
        package: What it is relative to.

    Returns:
        The module or what is taken from it; `None` if it cannot be imported.
    """
    try:
        whole = importlib.util.resolve_name(module, package or "")
        for full in (whole, f"{whole}.{name}") if name else (whole,):
            if full not in sys.modules and user_source_file(full, None):
                importlib.import_module(full)
    except Exception:  # of the user's module: the code that imports it will say so
        return None
    found = sys.modules.get(whole)
    return found if name is None else getattr(found, name, sys.modules.get(f"{whole}.{name}"))


def is_user_module(module: str, name: str | None, package: str | None) -> bool:
    """Whether an import statement is for a module of the user's own, imported or not yet.

    Args:
        module: As for `imported`.
        name: Likewise.
        package: Likewise.

    Returns:
        Whether it is.
    """
    try:
        whole = importlib.util.resolve_name(module, package or "")
    except (ImportError, ValueError):
        return True
    return any(
        user_source_file(full, None) for full in (whole, *([f"{whole}.{name}"] * bool(name)))
    )


def stable_name(thing: Any) -> str:
    """The name that stands for a function or a class, beside its code.

    Args:
        thing: Installed, or the user's own.

    Returns:
        With the module of what is installed. That of a user's own is "__main__" or not, as it runs.
    """
    return versioned_name(thing) if is_installed(thing.__module__) else thing.__qualname__


def user_source_file(module: str, package: str | None) -> Path | None:
    """The source of a module that is the user's own, imported or not yet.

    Args:
        module: Its name, with leading dots if it is relative.
        package: What it is relative to.

    Returns:
        The file, if there is one.
    """
    with suppress(ImportError, ValueError, AttributeError):
        name = importlib.util.resolve_name(module, package or "")
        if name.partition(".")[0] not in _UNVERSIONED:
            loaded = sys.modules.get(name)
            spec = importlib.util.find_spec(name) if loaded is None else None
            file = spec.origin if spec else getattr(loaded, "__file__", None)
            if file and Path(file).is_file() and not is_installed_file(file):
                return Path(file)
    return None
