import pytest
from helpers.steps import mlp, samples
from torch import Tensor, nn

from drophot.training.step_memory import step_memory


@pytest.mark.parametrize("batch", [1, 8])
def test_what_a_step_needs_is_counted(batch: int) -> None:
    inputs, targets = samples(batch, 6).tensors
    weights = 16 * 6 + 16 + 4 * 16 + 4
    kept = batch * 6 + batch * 16  # what the layers were given
    loss = batch * 4 + 1  # log-probabilities, and the sum of the samples' weights
    by_hand = 4 * (4 * weights + kept + loss) + 8 * batch
    assert step_memory(mlp(), inputs, targets) == by_hand


def test_what_two_layers_keep_is_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.one(inputs) + self.two(inputs)

    inputs, targets = samples(8, 6).tensors
    by_hand = 4 * (4 * 2 * 28 + 8 * 6 + 8 * 4 + 1) + 8 * 8
    assert step_memory(Twice(), inputs, targets) == by_hand
