"""Small models, and one optimiser step after the other."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import Dataset, TensorDataset

from drophot import IndexedDataset

OptimizerOf = Callable[[Any], Optimizer]


def samples(size: int, *shape: int, classes: int = 4) -> TensorDataset:
    noise = torch.Generator().manual_seed(0)
    targets = torch.randint(classes, (size,), generator=noise)
    inputs = torch.randn(size, *shape, generator=noise)
    return TensorDataset(inputs + targets.view(-1, *[1] * len(shape)) / 4, targets)


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *between, nn.ReLU(), nn.Linear(16, 4))


def train(
    loop: Callable[..., None],
    model: nn.Module,
    data: Dataset[Any],
    optimizer: OptimizerOf,
    **more: Any,
) -> list[Tensor]:
    """What a copy of the model has learned, buffers and all logits on the way included."""
    model = deepcopy(model)
    logits: list[Tensor] = []
    options = {"batch_size": 8, "seed": 3, "on_batch": lambda _, z, __: logits.append(z)} | more
    torch.manual_seed(1)
    loop(model, IndexedDataset(data), 2, optimizer=optimizer(model.parameters()), **options)
    return [*model.state_dict().values(), *logits]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class OwnAdam(Adam):
    """A user's, which may do as it likes."""
