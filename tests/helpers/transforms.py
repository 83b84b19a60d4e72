"""Transforms of samples and targets that worker processes can import."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Marked:
    """Leaves targets as they are, and a file named after the process that read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, target: Any) -> int:
        (self.folder / str(os.getpid())).touch()
        return int(target)

    def readers(self) -> set[int]:
        return {int(path.name) for path in self.folder.iterdir()}


class Named(Marked):
    """Gives the process that read a target."""

    def __call__(self, target: Any) -> int:
        super().__call__(target)
        return os.getpid()


class Drawn:
    """Adds what it draws."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.source == "torch":
            return inputs + torch.rand(())
        drawn = np.random.rand() if self.source == "numpy" else random.random()  # noqa: NPY002
        return inputs + drawn


class Broken:
    """Fails for one target."""

    def __init__(self, target: int) -> None:
        self.target = target

    def __call__(self, target: Any) -> int:
        if target == self.target:
            raise ValueError(f"sample {int(target)} is broken")
        return int(target)


class Added:
    """Adds a number that may be changed."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs + self.number
