"""Warnings about removed weights that no hold keeps at zero, so that they can grow back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from drophot._core.user_warnings import warn
from drophot.prune import earlier_masks


class Holding(Protocol):
    """A hold, as far as these warnings need it."""

    @property
    def weights(self) -> Mapping[str, nn.Parameter]: ...

    @property
    def masks(self) -> Mapping[str, Tensor]: ...


def warn_of_unheld(
    found: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], holds: Iterable[Holding]
) -> None:
    """Warn if masked parameters that are trained (some of `found`) are in none of the `holds`."""
    held = {id(weight) for hold in holds for weight in hold.weights.values()}
    unheld = [
        name
        for name, weight in found.items()
        if weight.requires_grad and id(weight) not in held and not masks[name].all()
    ]
    if unheld:
        removed = sum(int((~masks[name]).sum()) for name in unheld)
        total = sum(int((~mask).sum()) for mask in masks.values())
        warn(
            f"`hold` keeps only those weights at zero that its optimizer trains. {removed:,} of "
            f"{total:,} removed weights ({shortened(unheld)}) are not held and can grow back. Call "
            f"masks.hold(optimizer) for each optimizer that trains them. If none does, call "
            f"requires_grad_(False) on them."
        )


def warn_of_newer_masks(
    model: nn.Module, weights: Mapping[str, nn.Parameter], holds: Iterable[Holding]
) -> None:
    """Warn if a later pruning of a held model removed weights that no hold has masks for.

    `weights` are the held parameters, by their paths in the model.
    """
    newer = earlier_masks.masks_of(model, weights)
    held = {path: torch.ones_like(mask) for path, mask in newer.items()}
    path_of = {id(weights[path]): path for path in held}
    for hold in holds:
        for name, weight in hold.weights.items():
            if id(weight) in path_of:
                mask = held[path_of[id(weight)]]
                mask &= hold.masks[name].to(mask.device)
    unheld = {path: int((mask & ~newer[path]).sum()) for path, mask in held.items()}
    if removed := sum(unheld.values()):
        names = [path for path, count in unheld.items() if count]
        warn(
            f"`hold` keeps the masks that it was called with, but other masks have removed "
            f"{removed:,} more weights since ({shortened(names)}), which can grow back. End this "
            f"hold and call `hold` of the newer masks, or use Schedule, which prunes while it is "
            f"held."
        )


def shortened(names: list[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(f"`{name}`" for name in names[:3]) + ", …" * (len(names) > 3)
