"""Which zeros of a model are there because an earlier mask removed them."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from drophot.prune.current_parameters import paths

_BLOCK = 1 << 20  # weights looked at in one go

# The last mask that was applied to each parameter of a module, for as long as the module lives. It
# is kept by module, since torch cannot swap a parameter that something refers to weakly.
_masks: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_calls = [0]


def remember(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Note the masks whose removed weights have just been set to zero.

    Args:
        model: The model, wrapped or not.
        masks: By parameter name, `True` where a weight is kept.
    """
    _calls[0] += 1
    for name, path in paths(model, masks).items():
        owner, attribute = _owner(model, path)
        _masks.setdefault(owner, {})[attribute] = masks[name]


def changes() -> int:
    """A number that is greater after each call of `remember`.

    Returns:
        The number.
    """
    return _calls[0]


def masks_of(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks that hold still.

    Args:
        model: The model.
        weights: Its parameters, by name.

    Returns:
        By name, of those parameters that have one. None at all if a weight that one of them
        removed is there again: the masks were lifted, or other weights were loaded.
    """
    found = {}
    for name, weight in weights.items():
        owner, attribute = _owner(model, name)
        mask = _masks.get(owner, {}).get(attribute)
        if mask is not None and mask.shape == weight.shape:
            found[name] = mask.to(weight.device)
    held = all(_holds(weights[name], mask) for name, mask in found.items())
    return found if held else {}


def _holds(weight: Tensor, mask: Tensor) -> bool:
    """Whether all that a mask removed is zero, looked at in blocks to save memory."""
    blocks = zip(
        weight.detach().reshape(-1).split(_BLOCK), mask.reshape(-1).split(_BLOCK), strict=True
    )
    return not any(bool((values.bool() & ~kept).any()) for values, kept in blocks)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and its name there."""
    parent, _, attribute = path.rpartition(".")
    return model.get_submodule(parent), attribute
