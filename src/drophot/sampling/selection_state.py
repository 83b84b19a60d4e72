"""The state of a `CrestLoader`'s last selection, to save it and to send it to other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from drophot.sampling.crest import CrestLoader

_NUMBERS = ("selections", "checks", "check_every", "_steps_since_selection", "_first_norm")
_ON_CPU = ("_batches", "_weights", "_check_on")
_MODEL_OF_LOSS = ("_start_loss", "_origin", "_gradient", "_curvature", "_averages")
_GENERATORS = "generators"


def dump(loader: CrestLoader) -> dict[str, Any]:
    """Copies of everything that the following steps depend on, except for the model."""
    names = (*_NUMBERS, *((*_ON_CPU, *_MODEL_OF_LOSS) if loader.selections else ()))
    found: dict[str, Any] = {name.lstrip("_"): _copy(getattr(loader, name)) for name in names}
    generators = (loader._generator.bit_generator.state, loader._torch_generator.get_state())
    return found | {_GENERATORS: generators}


def check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse the selection for another model, as far as the number of parameters shows it."""
    wanted = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if (origin := state.get("origin")) is not None and origin.numel() != wanted:
        raise ValueError(
            f"`state_dict` must be of a model with the {wanted} trainable parameters of `model`, "
            f"got one with {origin.numel()}. Create the CrestLoader with the model that it was "
            f"saved with."
        )


def load(loader: CrestLoader, state: Mapping[str, Any]) -> None:
    """Set what a state has, and leave the rest as it is."""
    device = next(loader.model.parameters()).device
    if not state.get("selections", loader.selections):  # nothing was selected yet
        loader._averages = None
    for name in (*_NUMBERS, *_ON_CPU, *_MODEL_OF_LOSS):
        if (saved := name.lstrip("_")) in state:
            setattr(loader, name, _copy(state[saved], "cpu" if name in _ON_CPU else device))
    if _GENERATORS in state:
        loader._generator.bit_generator.state = state[_GENERATORS][0]
        loader._torch_generator.set_state(state[_GENERATORS][1].cpu())


def _copy(value: Any, device: torch.device | str | None = None) -> Any:
    """A copy of a number, a tensor or a tuple of tensors, on a device."""
    if isinstance(value, tuple):
        return tuple(_copy(part, device) for part in value)
    if isinstance(value, Tensor):
        return value.detach().to(device or value.device, copy=True)
    return value
