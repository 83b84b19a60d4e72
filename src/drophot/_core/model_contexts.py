"""Look at a model without leaving a trace."""

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
    """Evaluation mode without gradients, from which the model comes back as it was.

    Every submodule's own mode is put back (a frozen BatchNorm stays frozen), and so are the random
    generators, which merely iterating a DataLoader moves on: training goes on as if nobody had
    looked. A module whose `train()` does more than set a flag, as one that merges its adapters for
    evaluation, is put back by that method, and the weights that it changed have their bits again.

    Args:
        model: The model to look at.

    Yields:
        The device that the model's parameters are on.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    own = [(module, mode) for module, mode in modes if _has_own_train(module)]
    with random_state.preserved_rng(device), torch.no_grad():
        changed: list[tuple[Tensor, Tensor]] = []
        try:
            before = _copies([module for module, _ in own])
            model.eval()
            changed += [(now, was) for now, was in before if not torch.equal(now, was)]
            del before
            yield device
        finally:
            # From the outside in, since a module's own method sets what is inside it too.
            for module, mode in own:
                if module.training != mode:
                    module.train(mode)
            for module, mode in modes:
                module.training = mode
            for now, was in changed:
                now.data.copy_(was)  # what is merged and taken out again has other last bits


def _has_own_train(module: nn.Module) -> bool:
    kind = type(module)
    own = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return own or "train" in vars(module) or "eval" in vars(module)


def _copies(modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of some modules, and a copy of it."""
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if not is_lazy(tensor) and not tensor.is_meta
    }
    return [(tensor, tensor.detach().clone()) for tensor in tensors.values()]


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Put back attributes and buffers that a call changes: caches, counters, statistics.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    held = {
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
        for value, before in held.values():
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
    """Be told when a call enters one of the model's modules, and when it leaves it.

    Args:
        model: The model.
        enter: Called with the module's path.
        leave: Called at the module's end, the last one that was entered first.

    Yields:
        Nothing; the hooks come off again, also after an error.
    """
    entered: list[nn.Module] = []

    def hook(path: str) -> Callable[..., None]:
        def before(module: nn.Module, *_: Any) -> None:
            enter(path)
            entered.append(module)  # after it, so that nothing is left that was not entered

        return before

    def after(module: nn.Module, *_: Any) -> None:
        if entered and entered[-1] is module:  # else another hook failed before it was entered
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
