"""The names of a pruned model's parts in a model that is wrapped in another way."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from drophot.prune.current_parameters import own_names, without_wrappers


def names_in(
    model: nn.Module, names: Collection[str], module_paths: Collection[str]
) -> dict[str, str]:
    """The names of another model's tensors and modules in this one, which may be wrapped otherwise.

    `module_paths` names modules whose attributes are read. If a wrapper and the module in it both
    match, the inner one is returned.
    """
    modules = [path for path, _ in model.named_modules(remove_duplicate=False)]
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    own = {*modules, *(name for name, _ in tensors)}
    if own.issuperset(names):
        return {name: name for name in (*names, *module_paths)}
    return own_names(names, own) | {path: _module_in(modules, path) for path in module_paths}


def _module_in(modules: Collection[str], path: str) -> str:
    """The path of another model's module; a module may have a child that is named `module`."""
    found = [each for each in modules if without_wrappers(each) == without_wrappers(path)]
    same = [each for each in found if _ends_with(each, path) or _ends_with(path, each)]
    return max(same or found, key=len, default=path)


def _ends_with(path: str, end: str) -> bool:
    return not end or f".{path}".endswith(f".{end}")
