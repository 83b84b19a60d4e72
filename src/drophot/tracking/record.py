"""Writes the outcome of a batch into the state of a tracker."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drophot.tracking import packed_history
from drophot.tracking.deferred_errors import NO_TARGET, ONLY_LOSS
from drophot.tracking.state import State, to_device


class Rows(NamedTuple):
    """A batch in the order of its samples: their positions, ascending, and the row of each.

    `repeats` tells for all but the first whether it is the same sample as the one before. It is
    `None` if no sample is repeated.
    """

    position: Tensor
    order: Tensor
    repeats: Tensor | None


def record(
    state: State, index: Tensor, correct: Tensor, targets: Tensor | None, num_classes: int
) -> Rows:
    """Check a batch of samples `(B,)` and add it to the histories, in place.

    Without `targets`, nothing is known of them, and nothing is noted.
    """
    state.follow(correct.device)
    device = state.device
    correct = to_device(correct, device)
    index = to_device(index, device, torch.int64)

    position = index.clamp(0, state.num_samples - 1)
    if targets is None:
        state.check_equal(index, (position, index), classes=None)
    else:
        classes = to_device(targets, device)
        targets = classes.to(torch.int32)
        seen = state.targets.index_select(0, position)
        known = torch.where(seen == NO_TARGET, targets, seen)
        nearest = classes.clamp(0, num_classes - 1)
        state.check_equal(index, (position, index), (known, targets), classes=(nearest, classes))
        state.targets.index_copy_(0, position, known)

    return _add(state, position, correct)


def record_losses(state: State, index: Tensor, device: torch.device) -> Rows:
    """As `record`, for samples of which only the losses are known, on `device`.

    They count as not correct.
    """
    state.follow(device)
    index = to_device(index, state.device, torch.int64)
    position = index.clamp(0, state.num_samples - 1)
    state.check_equal(index, (position, index), classes=None)
    state.check_only_loss(index, state.targets.index_select(0, position))
    state.targets.index_fill_(0, position, ONLY_LOSS)
    return _add(state, position, torch.zeros_like(position, dtype=torch.bool))


def _add(state: State, position: Tensor, correct: Tensor) -> Rows:
    position, order = position.sort(stable=True)
    repeats = position[1:] == position[:-1]
    if state.can_sync and not repeats.any():
        repeats = None  # the usual batch, which is cheaper
    correct = correct.index_select(0, order)
    packed_history.present(state.columns["history"], position, correct, repeats, state.steps)
    return Rows(position, order, repeats)
