"""The names of a pruned model's parts in a model that is wrapped in another way."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from drophot.prune.current_parameters import own_names, without_wrappers


def names_in(model: nn.Module, names: Collection[str], callers: Collection[str]) -> dict[str, str]:
    """The names of another model's tensors and modules in this one, which may be wrapped otherwise.

    `callers` are modules with code of their own: of a wrapper and the module inside, the latter.
    """
    modules = [path for path, _ in model.named_modules(remove_duplicate=False)]
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    own = {*modules, *(name for name, _ in tensors)}
    if own.issuperset(names):
        return {name: name for name in (*names, *callers)}
    inner = {without_wrappers(path): path for path in sorted(modules, key=len)}
    return own_names(names, own) | {
        path: inner.get(without_wrappers(path), path) for path in callers
    }
