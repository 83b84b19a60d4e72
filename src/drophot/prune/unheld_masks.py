"""What is removed and held by nobody, so that it can grow back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from drophot._core.user_warnings import warn
from drophot.prune import earlier_masks


class Holding(Protocol):
    """What keeps removed weights at zero."""

    _weights: dict[str, nn.Parameter]

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks that are held now."""
        ...


def warn_of_loose(
    found: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], holds: Iterable[Holding]
) -> None:
    """Say what is trained and held by no optimiser.

    Args:
        found: The masked parameters that the model has now.
        masks: At least theirs, True where a weight is kept.
        holds: All that hold now.
    """
    held = {id(weight) for hold in holds for weight in hold._weights.values()}
    loose = [
        name
        for name, weight in found.items()
        if weight.requires_grad and id(weight) not in held and not masks[name].all()
    ]
    if loose:
        removed = sum(int((~masks[name]).sum()) for name in loose)
        total = sum(int((~mask).sum()) for mask in masks.values())
        warn(
            f"`hold` keeps the weights that its optimizer trains. Found {removed:,} of {total:,} "
            f"removed weights in none that is held ({listed(loose)}): they can grow back. Call "
            f"masks.hold(optimizer) for each optimizer that trains them; if none does, "
            f"requires_grad_(False) says so."
        )


def warn_of_newer(
    model: nn.Module, weights: Mapping[str, nn.Parameter], holds: Iterable[Holding]
) -> None:
    """Say what a later pruning of a held model removed, which only its own masks hold.

    Args:
        model: The model.
        weights: Those that are held, by their paths in it.
        holds: All that hold now.
    """
    newer = earlier_masks.masks_of(model, weights)
    kept = {path: torch.ones_like(mask) for path, mask in newer.items()}
    places = {id(weights[path]): path for path in kept}
    for hold in holds:
        for name, weight in hold._weights.items():
            if id(weight) in places:
                mask = kept[places[id(weight)]]
                mask &= hold.masks[name].to(mask.device)
    lost = {path: int((mask & ~newer[path]).sum()) for path, mask in kept.items()}
    if removed := sum(lost.values()):
        names = [path for path, count in lost.items() if count]
        warn(
            f"`hold` keeps the masks that it was called with. Found {removed:,} weights that were "
            f"removed by other masks since ({listed(names)}): they can grow back. End this hold "
            f"and call `hold` of the newer masks, or use Schedule, which prunes while it is held."
        )


def listed(names: list[str]) -> str:
    """A few names, for a message.

    Args:
        names: At least one.

    Returns:
        The first three.
    """
    return ", ".join(f"`{name}`" for name in names[:3]) + ", …" * (len(names) > 3)
