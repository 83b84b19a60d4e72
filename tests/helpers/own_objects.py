"""A score and a selector of a user's own, for runs, grids and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from drophot import select
from drophot.coreset import Evidence


@dataclass(frozen=True)
class Margin:
    """How far the true class is ahead, times a scale."""

    scale: float = 1.0
    name: str = "margin"
    hard_end: Literal["high", "low"] = "low"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        own = logits.gather(1, targets[:, None])[:, 0]
        others = logits.scatter(1, targets[:, None], -torch.inf)
        return self.scale * (own - others.amax(1))


@dataclass(frozen=True)
class Noise:
    """Draws from the generator that the training draws from."""

    name: str = "noise"
    hard_end: Literal["high", "low"] = "high"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.rand(len(logits))


@dataclass(frozen=True)
class Confident:
    """The samples that the scoring network is surest of, and some that were forgotten."""

    offset: int = 0
    name: str = "confident"
    needs: tuple[str, ...] = ("scores", "model", "targets")

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        model, dataset = cast("nn.Module", evidence.model), cast("Any", evidence.dataset)
        inputs = torch.stack([sample[0] for sample in dataset])
        with torch.no_grad():
            logits = model.eval()(inputs)
        sure = logits.softmax(1)[torch.arange(len(inputs)), evidence.targets]
        return select(sure + cast("Tensor", evidence.scores), ratio, seed=seed + self.offset)
