"""Equal weights."""

import torch
from torch import nn


def assert_same_weights(one: nn.Module | None, other: nn.Module | None) -> None:
    assert one is not None
    assert other is not None
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())
