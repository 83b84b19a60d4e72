"""What a network has beside its `state_dict` goes from one stage of a grid to the next."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drophot import DropHot, Grid

INPUTS = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()
TRAIN = TensorDataset(INPUTS[:80], TARGETS[:80])
TEST = TensorDataset(INPUTS[80:], TARGETS[80:])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(self.changed(inputs)).relu())

    def changed(self, inputs: Tensor) -> Tensor:
        return inputs


class Projection(Plain):
    """Random features that are drawn once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 6), persistent=False)

    def changed(self, inputs: Tensor) -> Tensor:
        return inputs @ self.get_buffer("weight")


class Order(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randperm(6)

    def changed(self, inputs: Tensor) -> Tensor:
        return inputs[:, self.order]


class Drawn(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = random.random() + float(np.random.rand())  # noqa: NPY002

    def changed(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


class Counts(Plain):
    """Noise that falls as training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def changed(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        self.steps += 1
        return inputs + torch.randn_like(inputs) / self.steps


class Remembers(Plain):
    """A mean that is no buffer, in a dict, in a module within."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.seen = {"mean": torch.zeros(6), "times": [0]}  # type: ignore[assignment]

    def changed(self, inputs: Tensor) -> Tensor:
        seen: Any = self.inner.seen
        if self.training:
            seen["mean"] = 0.9 * seen["mean"] + 0.1 * inputs.mean(0)
            seen["times"][0] += 1
        return inputs - seen["mean"] / max(seen["times"][0], 1)


class Fades(Plain):
    """A buffer that is not kept, and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def changed(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.scale *= 0.99
        return inputs * self.scale


class Generates(Plain):
    """Noise of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def changed(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        return inputs + torch.randn(inputs.shape, generator=self.generator)


class Extra(Plain):
    """State of its own in the `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.version = {"steps": 0}

    def changed(self, inputs: Tensor) -> Tensor:
        self.version["steps"] += self.training
        return inputs / (1 + self.version["steps"])

    def get_extra_state(self) -> Any:
        return dict(self.version)

    def set_extra_state(self, state: Any) -> None:
        self.version = dict(state)


def drop_hot(model: Callable[[], nn.Module], **changes: Any) -> DropHot:
    settings: dict[str, Any] = {
        **{"model": model, "train_set": TRAIN, "test_set": TEST, "device": "cpu"},
        **{"data_ratio": 0.5, "mode": "random", "prune_ratio": 0.5, "batch_size": 16},
        **{"score_epochs": 2, "train_epochs": 2, "finetune_epochs": 2},
    }
    return DropHot(**(settings | changes))


def grid(run: DropHot, **changes: Any) -> Grid:
    cells: dict[str, Any] = {"data_ratios": [0.5], "modes": ["random"], "prune_ratios": [0.5]}
    return Grid(run, **(cells | {"seeds": [0, 1]} | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [Plain, Projection, Order, Drawn, Counts, Remembers, Fades, Generates, Extra]
)
def test_each_record_is_the_one_of_the_run_alone(
    model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    run = drop_hot(model)
    for record in grid(run).run(tmp_path):
        mode = "random" if record.mode == "baseline" else record.mode
        ratios = {"data_ratio": record.keep_ratio, "prune_ratio": record.prune_ratio}
        assert run.replace(seed=record.seed, mode=mode, **ratios).run() == record


def test_features_are_of_the_network_that_was_trained(tmp_path: Path) -> None:
    run = drop_hot(Order, mode="k_center")
    *_, record = grid(run, modes=["k_center"], seeds=[1]).run(tmp_path)
    assert record == run.replace(seed=1).run()


class Holds(Plain):
    """Something that no file of tensors can hold, and that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = np.random.RandomState(0)

    def changed(self, inputs: Tensor) -> Tensor:
        return inputs * (1 + 0.01 * self.inside.rand())


class ExtraObject(Plain):
    def get_extra_state(self) -> Any:
        return Holds


class Grows(Plain):
    def changed(self, inputs: Tensor) -> Tensor:
        self.more = nn.Identity()
        return inputs


@pytest.mark.parametrize(
    ("model", "name"), [(Holds, "inside"), (ExtraObject, "_extra_state"), (Grows, "more")]
)
def test_what_cannot_be_kept_is_named(
    model: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=f"{name}.*`model`|`model`.*{name}"):
        grid(drop_hot(model), seeds=[0]).run(tmp_path)
