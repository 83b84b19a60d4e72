"""The state of a trained network that its `state_dict` lacks: counters, caches and the like."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drophot.pipeline.provenance.experiment import can_be_loaded
from drophot.pipeline.provenance.fingerprints import MODULE_ATTRIBUTES, describe


def remainder(model: nn.Module, twin: nn.Module) -> dict[str, Any]:
    """The changes of a trained network that are not in its `state_dict`.

    Args:
        model: The network after training.
        twin: A newly built network with the same `state_dict`.

    Returns:
        Values by the names of attributes and of buffers that are not persistent.

    Raises:
        TypeError: If training changed something that a file cannot hold.
    """
    found: dict[str, Any] = {}
    modules, others = _modules(model), _modules(twin)
    if changed := sorted(modules.keys() ^ others.keys()):
        raise TypeError(
            f"`model` must have the same modules after training as before, so that another process "
            f"can continue with it, but {changed[0]!r} differs. Create all modules in the factory."
        )
    for prefix, module in modules.items():
        own, built = _values(module), _values(others[prefix])
        for name, value in own.items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(value, torch.Generator):
                value, before = value.get_state(), _state(built.get(name))
            else:
                before = built.get(name)
            if name in built and describe(value)[0] == describe(before)[0]:
                continue
            if not can_be_loaded(value):
                raise TypeError(
                    f"`model` must hold what training changes as tensors, numbers, or lists and "
                    f"dicts of them, so that another process can continue with it, got a "
                    f"{type(value).__name__} in `{path}`. Make it a buffer, or return it from "
                    f"`get_extra_state`."
                )
            found[path] = value
    return found


def put_back(model: nn.Module, found: dict[str, Any]) -> None:
    """Give a newly built network the changes that `remainder` found."""
    for path, value in found.items():
        prefix, _, name = path.rpartition(".")
        module = model.get_submodule(prefix)
        if isinstance(generator := getattr(module, name, None), torch.Generator):
            generator.set_state(value.cpu())
        else:
            setattr(module, name, value)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]


def _values(module: nn.Module) -> dict[str, Any]:
    # torch has no public way to tell which buffers are persistent.
    names = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    buffers = {name: module.get_buffer(name) for name in names}
    own = {name: v for name, v in vars(module).items() if name not in MODULE_ATTRIBUTES}
    return buffers | own


def _state(generator: Any) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else None
