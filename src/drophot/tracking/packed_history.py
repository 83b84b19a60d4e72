"""A sample's history as one int64, so that a batch costs one gather and one addition.

Three counters of 20 bits say how often, three bits how the sample stands. Events and rights never
exceed presentations; presentations that outgrow their counter turn the sign bit on, which stays on
and which every read of a tracker checks. 0 is a sample that was never presented.

Two of the bits are there for training on several ranks: whether the sample was presented since the
ranks last compared, and whether it was right then for the first time. With them the histories of
ranks that started from the same one can be put one after the other, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAST, SEEN, FIRST = 1, 2, 4  # right last time; presented since then; right the first time since
_EVENT, _RIGHT, _PRESENTED = 1 << 3, 1 << 23, 1 << 43
_COUNTER = (1 << 20) - 1
_COUNTERS = ~(LAST | SEEN | FIRST)
_OUTGROWN = torch.iinfo(torch.int64).min
MOST_PRESENTATIONS = _COUNTER


def steps(device: torch.device) -> Tensor:
    """What a presentation adds to a history, by `2 * (its bits SEEN and LAST) + right_now`.

    Args:
        device: Where the table is to be.

    Returns:
        The eight steps, int64.
    """
    wrong_wrong, wrong_right = _PRESENTED, _PRESENTED + _RIGHT + LAST
    right_wrong, right_right = _PRESENTED + _EVENT - LAST, _PRESENTED + _RIGHT
    again = [wrong_wrong, wrong_right, right_wrong, right_right]
    first = [step + SEEN + (FIRST if number % 2 else 0) for number, step in enumerate(again)]
    return torch.tensor(first + again, device=device)


def present(
    history: Tensor, place: Tensor, correct: Tensor, again: Tensor | None, steps: Tensor
) -> None:
    """Write a batch into the histories, in place.

    Sorted, a sample's repeats in the batch stand side by side, and the one before tells whether it
    was right last time. The steps of repeats add up to the same as one after the other.

    Args:
        history: The histories, int64, shape `(N,)`.
        place: The samples presented, ascending, int64, shape `(B,)`, at most `MOST_PRESENTATIONS`.
        correct: Whether they are right, bool, shape `(B,)`.
        again: Whether each but the first is the same sample as the one before, bool, shape
            `(B - 1,)`; `None` if none is.
        steps: What `steps` gave.
    """
    found = history.index_select(0, place)
    before = found & (SEEN | LAST)
    if again is not None:
        before[1:] = torch.where(again, correct[:-1] + SEEN, before[1:])
    # What has outgrown its counter is not added to: it would come round to a valid history again.
    step = steps.index_select(0, 2 * before + correct).masked_fill_(found < 0, 0)
    history.index_add_(0, place, step)


def join(before: Tensor, base: Tensor, after: Tensor) -> Tensor:
    """What one rank saw put after what others saw, all of them having started from one history.

    Args:
        before: What it comes after, int64, any shape.
        base: What all started from.
        after: What the rank has; it has presented each of these samples.

    Returns:
        The history of one process that saw both.
    """
    # Its first presentation was compared with the base, and now comes after another one.
    event = ((before & LAST) - (base & LAST)) * _EVENT
    joined = (before & _COUNTERS) + ((after & _COUNTERS) - (base & _COUNTERS))
    joined = (joined + torch.where(after & FIRST == 0, event, 0)) | (after & LAST) | SEEN
    return torch.where((before < 0) | (after < 0), _OUTGROWN, joined)


def events(history: Tensor) -> Tensor:
    """Forgetting events, int64."""
    return (history >> 3) & _COUNTER


def learned(history: Tensor) -> Tensor:
    """Whether right at least once, bool."""
    return (history >> 23) & _COUNTER > 0


def presentations(history: Tensor) -> Tensor:
    """How often presented, int64."""
    return history >> 43
