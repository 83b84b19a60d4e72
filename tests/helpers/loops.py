"""Data sets and models for tests of the training loop."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Listed(Dataset):
    """Samples read one by one, as from files; counts the readings."""

    def __init__(self, size: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(size, 3, generator=generator)
        self.readings = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.readings += 1
        return self.inputs[i], int(self.inputs[i].sum() > 0)


class Augmented(Listed):
    """Random as transforms are, from whichever generator they use."""

    def __init__(self, source: str, size: int = 10) -> None:
        super().__init__(size)
        self.source = source
        self.own = np.random.default_rng(0)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(i)
        draw = {
            "torch": lambda: torch.rand(()).item(),
            "numpy": lambda: np.random.rand(),  # noqa: NPY002
            "python": random.random,
            "its own": self.own.random,
        }[self.source]
        return inputs + draw(), target


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
