"""Small data, and a run of the five steps on it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import TensorDataset

from drophot import DropHot
from drophot.models import fcnet


def points(size: int, seed: int, noise: float = 0.0) -> TensorDataset:
    """Three classes on a plane, of which some are labelled wrong."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 2, generator=generator)
    targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    wrong = torch.rand(size, generator=generator) < noise
    return TensorDataset(inputs, torch.where(wrong, (targets + 1) % 3, targets))


TRAIN, TEST = points(120, 0, noise=0.1), points(60, 1)


small = partial(fcnet, in_features=2, hidden=16, num_classes=3)


SETTINGS: dict[str, Any] = {
    "model": small,
    "train_set": TRAIN,
    "test_set": TEST,
    "data_ratio": 0.5,
    "mode": "high",
    "prune_ratio": 0.6,
    "score_epochs": 6,
    "train_epochs": 3,
    "finetune_epochs": 2,
    "optimizer": partial(Adam, lr=0.02),
    "batch_size": 16,
    "device": "cpu",
}


def drop_hot(**changes: Any) -> DropHot:
    return DropHot(**(SETTINGS | changes))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
