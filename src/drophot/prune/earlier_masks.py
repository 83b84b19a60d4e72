"""The masks of earlier prunings, which tell removed weights from other zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

from drophot._core.block_threads import map_blocks
from drophot._core.float_keys import FloatKeys
from drophot._core.radix_select import has_kernels
from drophot.prune.current_parameters import paths
from drophot.prune.device_pruning import count_values

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
    masked = [weights[name] for name in found]
    if has_kernels(masked):
        intact = not any(count.revived for count in count_values(masked, [*found.values()]))
    else:
        intact = _are_zero(masked, [*found.values()])
    return found if intact else {}


def _are_zero(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    """Whether all weights that the masks removed are zero."""
    keys = [FloatKeys(weight) for weight in weights]
    keep = [mask.reshape(-1).cpu().numpy() for mask in masks]

    def revived(number: int, block: slice) -> bool:
        return bool(np.greater(keys[number][block] != 0, keep[number][block]).any())

    return not any(map(any, map_blocks(revived, map(len, keys))))


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and its name there."""
    *parents, attribute = path.split(".")
    for name in parents:  # `get_submodule` takes twice the time
        module = model._modules[name]
        assert module is not None
        model = module
    return model, attribute
