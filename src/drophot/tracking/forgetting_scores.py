"""The forgetting score of each sample, from its packed history."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from drophot.tracking import packed_history

NeverLearned = Literal["hardest", "zero"]
Missing = Literal["raise", "nan"]


def check_never_learned(value: Any) -> None:
    """Refuse a value that is not a `NeverLearned`."""
    if value not in ("hardest", "zero"):
        raise ValueError(f'`never_learned` must be "hardest" or "zero", got {value!r}.')


def forgetting_scores(history: Tensor, never_learned: NeverLearned, missing: Missing) -> Tensor:
    """The scores `(N,)` of histories `(N,)`; see `ForgettingTracker.scores`."""
    scores, presented = packed_history.events(history), packed_history.presentations(history)
    if never_learned == "hardest":
        above = torch.maximum(presented, scores.max() + 1)
        scores = torch.where(packed_history.learned(history), scores, above)
    if missing == "raise":
        return scores
    return scores.float().masked_fill_(presented == 0, torch.nan)
