"""The state of a `CrestLoader`'s last selection, to save it and to send it to other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from drophot.sampling.saved_state import SavedState

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


def check(loader: CrestLoader, saved: SavedState) -> None:
    """Refuse a state that is damaged, or of a model with another number of parameters."""
    steps, total = loader._steps, loader._total
    selected = "selections" not in saved.values or saved.integer("selections") > 0
    names = (*_NUMBERS, *((*_ON_CPU, *_MODEL_OF_LOSS) if selected else ()), _GENERATORS)
    saved.check_names([name.lstrip("_") for name in names], "CrestLoader")
    for name in ("checks", "steps_since_selection"):
        saved.integer(name)
    saved.integer("check_every", least=1, most=max(steps, 1))
    saved.real("first_norm", least=0)
    _check_generators(saved)
    if not selected:
        return
    batches = saved.indices("batches", (None, min(loader.batch_size, total)), total)
    checked = saved.indices("check_on", (None,), total)
    for name, value in (("batches", batches), ("check_on", checked)):
        if not len(value):
            raise ValueError(
                f'`{saved.label}["{name}"]` must not be empty, got shape {tuple(value.shape)}. The '
                f"state is damaged; load another one."
            )
    saved.weights("weights", tuple(batches.shape))
    if (loss := saved.real("start_loss")) < 0:  # it may be NaN, as that of a model may
        raise ValueError(
            f'`{saved.label}["start_loss"]` must be a loss of at least 0, got {loss:g}. The state '
            f"is damaged; load another one."
        )
    wanted = sum(weight.numel() for weight in loader.model.parameters() if weight.requires_grad)
    origin = saved.tensor("origin", (None,))
    if origin.numel() != wanted:
        raise ValueError(
            f"`state_dict` must be of a model with the {wanted} trainable parameters of `model`, "
            f"got one with {origin.numel()}. Create the CrestLoader with the model that it was "
            f"saved with."
        )
    for name in ("gradient", "curvature"):
        saved.tensor(name, (wanted,))
    averages = saved.values["averages"]
    if not isinstance(averages, tuple) or len(averages) != 2:
        raise ValueError(
            f'`{saved.label}["averages"]` must be two tensors, got {type(averages).__name__}. The '
            f"state is damaged; load another one."
        )
    for average in averages:
        saved.checked_tensor("averages", average, (wanted,))


def _check_generators(saved: SavedState) -> None:
    found = saved.values[_GENERATORS]
    try:
        bits, state = found
        np.random.default_rng(0).bit_generator.state = bits
        torch.Generator().set_state(state.cpu())
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f'`{saved.label}["{_GENERATORS}"]` must be the states of a generator of NumPy and one '
            f"of torch, got {type(found).__name__} ({error}). The state is damaged; load another "
            f"one."
        ) from error


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
