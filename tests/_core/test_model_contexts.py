"""Whoever looks at a model gives it back as it was, whatever its `train()` does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from drophot import (
    ForgettingTracker,
    IndexedDataset,
    evaluate,
    features,
    summary,
)
from drophot.prune import recalibrate_bn

INPUTS = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(INPUTS, torch.arange(10) % 3)


class Merging(nn.Linear):
    """LoRA as loralib writes it: evaluation merges the adapter into the weight."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.adapter = nn.Parameter(torch.randn_like(self.weight) / 3)
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.adapter.data
            self.merged = not mode
        return self

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if self.merged else self.weight + self.adapter
        return nn.functional.linear(input, weight, self.bias)


class Outer(nn.Module):
    """Keeps one part of it in evaluation mode, as detection networks do with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.merging, self.norm, self.last = Merging(4, 5), nn.BatchNorm1d(5), Merging(5, 3)
        self.train()

    def train(self, mode: bool = True) -> "Outer":
        super().train(mode)
        self.norm.train(False)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.merging(inputs)))


def state(model: nn.Module) -> list[Any]:
    modes = [(module.training, getattr(module, "merged", None)) for module in model.modules()]
    return [*modes, *(value.clone() for value in model.state_dict().values())]


def is_equal(one: list[Any], other: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "evaluate": lambda model: evaluate(model, DATA),
    "features": lambda model: features(model, DATA, "error"),
    "observe": lambda model: ForgettingTracker(10).observe(
        model, DataLoader(IndexedDataset(DATA), 5)
    ),
    "summary": lambda model: summary(model, INPUTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", [lambda: nn.Sequential(Merging(4, 3)), Outer])
@pytest.mark.parametrize("mode", [True, False])
def test_a_model_whose_modes_do_something_comes_back_bit_for_bit(
    look: str, kind: Any, mode: bool
) -> None:
    torch.manual_seed(0)
    model = kind().train(mode)
    before = state(model)
    for _ in range(3):
        LOOKS[look](model)
    assert is_equal(state(model), before)


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_modules_of_different_modes_come_back_each_in_its_own(modes: list[bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Merging(4, 4), nn.Sequential(Merging(4, 4), nn.Dropout()), Merging(4, 3))
    for module, mode in zip((model[0], model[1][0], model[2]), modes, strict=True):
        module.train(mode)
    before = state(model)
    evaluate(model, DATA)
    assert is_equal(state(model), before)


def test_a_method_of_the_object_is_called_too() -> None:
    model = network = nn.Linear(4, 3)
    calls: list[bool] = []

    def train(mode: bool = True) -> nn.Module:
        calls.append(mode)
        return nn.Module.train(network, mode)

    vars(model)["train"] = train
    evaluate(model, DATA)
    assert calls == [False, True]


def test_recalibration_survives_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = Outer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    recalibrate_bn(model, DataLoader(DATA, 5))
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert [module.training for module in model.modules()] == modes


def test_a_model_comes_back_after_an_error() -> None:
    model = nn.Sequential(Merging(4, 3))
    before = state(model)
    with pytest.raises(RuntimeError):
        evaluate(model, TensorDataset(torch.randn(5, 7), torch.zeros(5, dtype=torch.int64)))
    assert is_equal(state(model), before)
