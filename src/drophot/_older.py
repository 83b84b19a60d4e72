"""Which zeros of a parameter are there because an earlier mask removed them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# The last mask that was applied to a parameter, for as long as the parameter lives.
_masks = WeakIdKeyDictionary()


def remember(weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    """Note the masks whose removed weights have just been set to zero.

    Args:
        weights: The parameters, by name.
        masks: Their masks, `True` where a weight is kept.
    """
    for name, mask in masks.items():
        _masks[weights[name]] = mask


def masks_of(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The masks that hold still.

    Args:
        weights: The parameters of one model, by name.

    Returns:
        By name, of those parameters that have one. None at all if a weight that one of them
        removed is there again: the masks were lifted, or other weights were loaded.
    """
    found = {
        name: mask.to(weight.device)
        for name, weight in weights.items()
        if (mask := _masks.get(weight)) is not None and mask.shape == weight.shape
    }
    held = all(not weights[name].detach()[~mask].any() for name, mask in found.items())
    return found if held else {}
