"""Scores of a user's own, and what a rank does with them in `tests/tracking/test_own_score.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from drophot import DynamicsTracker
from drophot.tracking import DUAL, FirstLearned, Last, MovingAverage, Spread

N, C = 20, 4
Batch = tuple[Tensor, Tensor, Tensor]  # index, logits, targets


class Entropy:
    """A class with attributes, which ignores the targets."""

    name = "entropy"
    hard_end: Literal["high", "low"] = "high"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        p = logits.softmax(dim=1)
        return -(p * p.log()).sum(dim=1)


@dataclass(frozen=True)
class Power:
    """A score with a setting, computed in float64."""

    exponent: float
    name: str = "power"
    hard_end: Literal["high", "low"] = "low"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        p = logits.double().softmax(dim=1)
        return p.gather(1, targets[:, None])[:, 0] ** self.exponent


def tracker(size: int = N) -> DynamicsTracker:
    power = Power(2)
    spread = Spread(score=power, name="power_spread")
    return DynamicsTracker(size, statistics=["variability", Entropy(), "aum", spread, power])


def accumulating(size: int = N) -> DynamicsTracker:
    """Scores that keep more than a mean; no rank shows a sample 20 times in an epoch."""
    window = DUAL(window=20, until=None)
    scores = [window, Last(), MovingAverage(), FirstLearned(), FirstLearned(for_good=True)]
    return DynamicsTracker(size, statistics=scores)


def batches(seed: int, count: int = 6) -> list[Batch]:
    """Batches with repeats, and samples that are missing."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Batch] = []
    for _ in range(count):
        index = torch.randint(N - 2, (9,), generator=generator)
        found.append((index, 2 * torch.randn(9, C, generator=generator), index % C))
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found, other = tracker(), accumulating()
    for epoch in range(3):
        for batch in batches(10 * epoch + rank):
            found.update(*batch)
            other.update(*batch)
        found.sync()
        other.sync()
    accumulated = other.state_dict()
    save({"tracker": found}, checkpoint_id=folder / "dcp")
    again = tracker()
    load({"tracker": again}, checkpoint_id=folder / "dcp")
    other = DynamicsTracker(N, statistics=["aum", Entropy() if rank else Power(1)])
    try:
        other.sync()
        error = "none"
    except ValueError as raised:
        error = str(raised)
    try:
        DynamicsTracker(N, statistics=[MovingAverage(decay=0.5 + rank / 4)]).sync()
        arguments = "none"
    except ValueError as raised:
        arguments = str(raised)
    states = {
        "state": found.state_dict(),
        "loaded": again.state_dict(),
        "error": error,
        "other": arguments,
    }
    states["accumulated"] = accumulated
    torch.save(states, folder / f"{rank}.pt")
    dist.barrier()  # no rank leaves while another one still communicates
    dist.destroy_process_group()
