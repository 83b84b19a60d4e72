"""Whether code is installed, and identified by name and version, or belongs to the user."""

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

# Configurations record the versions of these separately.
_UNVERSIONED = ("torch", "drophot", "builtins", *sys.stdlib_module_names)


def qualified_name(thing: Any) -> str:
    """The qualified name of a function, a class or an object's class, with the module."""
    kind = thing if isinstance(getattr(thing, "__qualname__", None), str) else type(thing)
    module = getattr(kind, "__module__", None) or "builtins"
    return f"{module}.{kind.__qualname__}"


def minor_version(version: str) -> str:
    """The version without its patch release: "2.6" for "2.6.1+cpu"."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def lookup_by_name(thing: Any) -> Any:
    """The object that is found under the name of a function or a class, or `None`."""
    found: Any = sys.modules.get(thing.__module__)
    for name in thing.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or an installed package, not to the user."""
    top = (module or "builtins").partition(".")[0]
    if top in _UNVERSIONED:
        return True
    if top == "__main__":  # a user's script, even if a tool runs it
        return False
    file = getattr(sys.modules.get(module or "") or sys.modules.get(top), "__file__", None)
    return file is not None and is_installed_file(file)


@cache
def is_installed_file(file: str) -> bool:
    """Whether a file, named as in code objects and modules, is Python's or installed."""
    if file.startswith("<frozen") or {"site-packages", "dist-packages"} & {*PurePath(file).parts}:
        return True
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), Path(paths["platstdlib"])]
    folders += [Path(module.__file__ or "").parent for module in (torch, np)]
    folders.append(Path(__file__).parents[1])
    return any(PurePath(file).is_relative_to(folder) for folder in folders)


def versioned_name(thing: Any) -> str:
    """The qualified name with the version of its package: "timm.models.resnet.resnet18 (timm 1.0)".

    Names of torch, Python and the user have no version.
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
    """The result of an import statement in a user's code; `None` if the import fails.

    Args:
        module: The module's name, with leading dots if it is relative.
        name: The name that is imported from the module, if any.
        package: The package that `module` is relative to.
    """
    try:
        whole = importlib.util.resolve_name(module, package or "")
        for full in (whole, f"{whole}.{name}") if name else (whole,):
            if full not in sys.modules and user_source_file(full, None):
                importlib.import_module(full)
    except Exception:  # raised by the user's module, whose importer will report it
        return None
    found = sys.modules.get(whole)
    return found if name is None else getattr(found, name, sys.modules.get(f"{whole}.{name}"))


def is_user_module(module: str, name: str | None, package: str | None) -> bool:
    """Whether an import statement (see `resolve_import`) refers to a module of the user."""
    try:
        whole = importlib.util.resolve_name(module, package or "")
    except (ImportError, ValueError):
        return True
    return any(
        user_source_file(full, None) for full in (whole, *([f"{whole}.{name}"] * bool(name)))
    )


def stable_name(thing: Any) -> str:
    """The name that identifies a function or a class together with its code.

    It includes the module only for installed code; that of a user's script is sometimes "__main__".
    """
    return versioned_name(thing) if is_installed(thing.__module__) else thing.__qualname__


def user_source_file(module: str, package: str | None) -> Path | None:
    """The source file of a module of the user, imported or not; `None` for other modules."""
    with suppress(ImportError, ValueError, AttributeError):
        name = importlib.util.resolve_name(module, package or "")
        if name.partition(".")[0] not in _UNVERSIONED:
            loaded = sys.modules.get(name)
            spec = importlib.util.find_spec(name) if loaded is None else None
            file = spec.origin if spec else getattr(loaded, "__file__", None)
            if file and Path(file).is_file() and not is_installed_file(file):
                return Path(file)
    return None
