"""What training changed in a network that its `state_dict` does not hold: counters and caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drophot.pipeline.provenance.experiment import can_be_loaded
from drophot.pipeline.provenance.fingerprints import describe

_PARTS = vars(nn.Module()).keys()  # that every module has


def remainder(model: nn.Module, twin: nn.Module) -> dict[str, Any]:
    """What has to be kept of a trained network beside its `state_dict`.

    Args:
        model: The network after training.
        twin: The same network as it is built, with its `state_dict` loaded.

    Returns:
        Values by the names of attributes and of buffers that are not persistent.

    Raises:
        TypeError: If training changed something that a file cannot hold.
    """
    found: dict[str, Any] = {}
    modules, others = dict(model.named_modules()), dict(twin.named_modules())
    if changed := sorted(modules.keys() ^ others.keys()):
        raise TypeError(
            f"`model` should have the same modules after training as before, to go on in another "
            f"process. Found a difference in {changed[0]!r}; build all of them in the factory."
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
                    f"`model` should keep what training changes as tensors, numbers or lists and "
                    f"dicts of them, to go on in another process. Found {type(value).__name__} in "
                    f"`{path}`; make it a buffer or return it from `get_extra_state`."
                )
            found[path] = value
    return found


def put_back(model: nn.Module, found: dict[str, Any]) -> None:
    """Give a network what `remainder` kept.

    Args:
        model: As it is built.
        found: What was kept.
    """
    for path, value in found.items():
        prefix, _, name = path.rpartition(".")
        module = model.get_submodule(prefix)
        if isinstance(generator := getattr(module, name, None), torch.Generator):
            generator.set_state(value.cpu())
        else:
            setattr(module, name, value)


def _values(module: nn.Module) -> dict[str, Any]:
    buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    return buffers | {name: v for name, v in vars(module).items() if name not in _PARTS}


def _state(generator: Any) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else None
