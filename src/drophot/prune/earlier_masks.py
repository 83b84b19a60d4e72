"""The masks of earlier prunings, which tell removed weights from other zeros."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from drophot.prune.current_parameters import paths

_BLOCK = 1 << 20  # weights per block, to save memory

# The last mask that was applied to each parameter of a module, for as long as the module lives. The
# key is the module, since torch cannot swap a parameter that is weakly referenced.
_masks: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_calls = [0]


def remember(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Note the masks whose removed weights have just been set to zero."""
    _calls[0] += 1
    for name, path in paths(model, masks).items():
        owner, attribute = _owner(model, path)
        _masks.setdefault(owner, {})[attribute] = masks[name]


def num_calls() -> int:
    """How often `remember` has been called."""
    return _calls[0]


def masks_of(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of those parameters that have one, by name.

    There are none if any weight that a mask removed is no longer zero, because the masks were
    lifted or other weights were loaded.
    """
    found = {}
    for name, weight in weights.items():
        owner, attribute = _owner(model, name)
        mask = _masks.get(owner, {}).get(attribute)
        if mask is not None and mask.shape == weight.shape:
            found[name] = mask.to(weight.device)
    intact = all(_is_intact(weights[name], mask) for name, mask in found.items())
    return found if intact else {}


def _is_intact(weight: Tensor, mask: Tensor) -> bool:
    """Whether all weights that a mask removed are zero."""
    blocks = zip(
        weight.detach().reshape(-1).split(_BLOCK), mask.reshape(-1).split(_BLOCK), strict=True
    )
    return not any(bool((values.bool() & ~keep_mask).any()) for values, keep_mask in blocks)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and its name there."""
    parent, _, attribute = path.rpartition(".")
    return model.get_submodule(parent), attribute
