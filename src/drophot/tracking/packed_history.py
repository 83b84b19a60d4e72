"""The history of a sample as one int64, so that a batch takes one gather and one addition.

Three counters of 20 bits hold the numbers of forgetting events, correct presentations and
presentations, and three bits the current state. The first two counters never exceed the third. A
counter that overflows sets the sign bit, which stays set and which every read of a tracker checks.
A history of 0 belongs to a sample that was never presented.

Two of the bits serve training on several ranks: whether the sample was presented since the last
merge, and whether it was correct the first time since then. With them the histories of ranks that
started from the same history can be concatenated exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Correct last time; presented since the last merge; correct the first time since then.
LAST, SEEN, FIRST = 1, 2, 4
EVENT, CORRECT, PRESENTED_BITS = 1 << 3, 1 << 23, 43
PRESENTED = 1 << PRESENTED_BITS
_COUNTER = (1 << 20) - 1
_COUNTERS = ~(LAST | SEEN | FIRST)
_OVERFLOWED = torch.iinfo(torch.int64).min
MAX_PRESENTATIONS = _COUNTER


def steps(device: torch.device) -> Tensor:
    """The eight int64 increments of a presentation, by `2 * (bits SEEN and LAST) + is_correct`."""
    wrong_wrong, wrong_right = PRESENTED, PRESENTED + CORRECT + LAST
    right_wrong, right_right = PRESENTED + EVENT - LAST, PRESENTED + CORRECT
    later = [wrong_wrong, wrong_right, right_wrong, right_right]
    first = [step + SEEN + (FIRST if number % 2 else 0) for number, step in enumerate(later)]
    return torch.tensor(first + later, device=device)


def present(
    history: Tensor, position: Tensor, correct: Tensor, repeats: Tensor | None, steps: Tensor
) -> None:
    """Add a batch to the histories, in place.

    The repeats of a sample in the sorted batch are adjacent, and the one before tells whether it
    was correct last time. The increments of repeats add up as if they were presented in turn.

    Args:
        history: The histories, int64, shape `(N,)`.
        position: The samples, ascending, int64, shape `(B,)`, at most `MAX_PRESENTATIONS`.
        correct: Whether they are correct, bool, shape `(B,)`.
        repeats: For all but the first, whether it is the same sample as the one before, bool,
            shape `(B - 1,)`; `None` if no sample is repeated.
        steps: The table of `steps`.
    """
    found = history.index_select(0, position)
    before = found & (SEEN | LAST)
    if repeats is not None:
        before[1:] = torch.where(repeats, correct[:-1] + SEEN, before[1:])
    # A history that has overflowed stays as it is: adding to it could make it valid again.
    step = steps.index_select(0, 2 * before + correct).masked_fill_(found < 0, 0)
    history.index_add_(0, position, step)


def join(before: Tensor, base: Tensor, after: Tensor) -> Tensor:
    """The history of one process that saw the batches of the others, then those of a rank.

    Args:
        before: The history of the others, int64, any shape.
        base: The history that all ranks started from.
        after: The history of the rank, which has presented each of these samples.
    """
    # The rank compared its first presentation with the base; now another one comes before it.
    event = ((before & LAST) - (base & LAST)) * EVENT
    joined = (before & _COUNTERS) + ((after & _COUNTERS) - (base & _COUNTERS))
    joined = (joined + torch.where(after & FIRST == 0, event, 0)) | (after & LAST) | SEEN
    return torch.where((before < 0) | (after < 0), _OVERFLOWED, joined)


def events(history: Tensor) -> Tensor:
    """Forgetting events, int64."""
    return (history >> 3) & _COUNTER


def learned(history: Tensor) -> Tensor:
    """Whether correct at least once, bool."""
    return (history >> 23) & _COUNTER > 0


def presentations(history: Tensor) -> Tensor:
    """The number of presentations, int64."""
    return history >> PRESENTED_BITS
