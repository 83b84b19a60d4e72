"""What one process gives that sees what all ranks see."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from drophot import DynamicsTracker


def assert_same(state: dict[str, Any], expected: dict[str, Any], digits: float) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            np.testing.assert_allclose(state[name], value, rtol=digits, atol=digits, err_msg=name)
        elif digits == 0 or name != "tails":  # what a mean is more than float32 can say
            assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name


def in_one_process(size: int, shown: list[list[Any]]) -> dict[str, Any]:
    """What ranks showed, lists of (epoch, index, logits, targets), epoch by epoch, rank by rank."""
    tracker = DynamicsTracker(size)
    epochs = sorted({int(epoch) for rank in shown for epoch, *_ in rank})
    for now in epochs:
        for rank in shown:
            for epoch, *batch in rank:
                if int(epoch) == now:
                    tracker.update(*batch)
    return tracker.state_dict()
