"""Contexts that run a model and restore what the run changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from drophot._core import random_state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model in evaluation mode without gradients, and restore it; yields the model's device.

    The mode of every submodule is restored, so a frozen BatchNorm stays frozen. The random
    generators are, too, because even iterating over a DataLoader draws from them. A module with a
    `train()` method that does more than set a flag, such as one that merges its adapters for
    evaluation, is restored by that method, and weights that it changed are restored bit by bit.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    custom = [(module, mode) for module, mode in modes if _overrides_train(module)]
    with random_state.preserved_rng(device), torch.no_grad():
        changed: list[tuple[Tensor, Tensor]] = []
        try:
            before = _copies([module for module, _ in custom])
            model.eval()
            changed += [(now, was) for now, was in before if not torch.equal(now, was)]
            del before
            yield device
        finally:
            # From the outermost module inward, because such a method also sets its submodules.
            for module, mode in custom:
                if module.training != mode:
                    module.train(mode)
            for module, mode in modes:
                module.training = mode
            for now, was in changed:
                now.data.copy_(was)  # merging and unmerging changes the last bits


def _overrides_train(module: nn.Module) -> bool:
    kind = type(module)
    overridden = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return overridden or "train" in vars(module) or "eval" in vars(module)


def _copies(modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the modules with a copy of it."""
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if not is_lazy(tensor) and not tensor.is_meta
    }
    return [(tensor, tensor.detach().clone()) for tensor in tensors.values()]


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore the attributes and buffers that a call changes: caches, counters, statistics."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    containers = {
        id(value): (value, value.copy())
        for _, values in attributes
        for value in values.values()
        if isinstance(value, (dict, list, set))
    }
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for value, before in containers.values():
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextmanager
def call_hooks(
    model: nn.Module, enter: Callable[[str], object], leave: Callable[[], object]
) -> Iterator[None]:
    """Call `enter(path)` and `leave()` when a call enters and leaves each of the model's modules.

    Calls of `leave` belong to the last module entered. The hooks are removed at the end, also after
    an error.
    """
    entered: list[nn.Module] = []

    def hook(path: str) -> Callable[..., None]:
        def before(module: nn.Module, *_: Any) -> None:
            enter(path)
            entered.append(module)  # after `enter`, which may raise an error

        return before

    def after(module: nn.Module, *_: Any) -> None:
        if entered and entered[-1] is module:  # otherwise another hook failed before `before`
            entered.pop()
            leave()

    hooks = [
        handle
        for path, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(hook(path)),
            module.register_forward_hook(after, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
