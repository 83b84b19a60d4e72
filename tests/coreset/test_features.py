from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from drophot import IndexedDataset, features, models


def data(size: int = 700, width: int = 4, classes: int = 3) -> TensorDataset:
    draws = torch.Generator().manual_seed(0)
    targets = torch.randint(0, classes, (size,), generator=draws)
    return TensorDataset(torch.randn(size, width, generator=draws), targets)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
    )


def test_penultimate_is_what_the_last_layer_is_given() -> None:
    model, given = network(), data()
    found = features(model, given)
    with torch.no_grad():
        expected = model.eval()[:-1](given.tensors[0])
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32


def test_error_is_softmax_minus_one_hot() -> None:
    model, given = network(), data(20)
    found = features(model, given, "error")
    logits = model.eval()(given.tensors[0]).detach().double().numpy()
    for row, z, target in zip(found, logits, given.tensors[1].tolist(), strict=True):
        expected = references.softmax(z) - np.eye(3)[target]
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-6)


def test_error_is_the_gradient_of_the_loss_by_the_logits() -> None:
    model, given = network().eval(), data(20)
    logits = model(given.tensors[0]).detach().requires_grad_()
    F.cross_entropy(logits, given.tensors[1], reduction="sum").backward()
    torch.testing.assert_close(features(model, given, "error"), logits.grad)


@pytest.mark.parametrize("kind", ["penultimate", "error"])
def test_one_pass_in_the_datasets_order_that_leaves_no_trace(kind: Any) -> None:
    model = network().train()
    model[3].eval()
    calls: list[int] = []
    model.register_forward_hook(lambda module, given, output: calls.append(len(given[0])))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    whole = features(model, IndexedDataset(data()), kind)
    assert torch.equal(torch.rand(1), (torch.manual_seed(5), torch.rand(1))[1])
    assert sum(calls) == 700
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, True, True, False, True]
    assert not whole.requires_grad
    part = features(model, Subset(data(), [5, 699, 2]), kind)
    torch.testing.assert_close(part, whole[[5, 699, 2]])


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).log_softmax(1)


def test_a_model_that_does_not_end_in_a_linear_layer_is_named() -> None:
    with pytest.raises(ValueError, match='`model`.*Headless.*kind="error"'):
        features(Headless(), data(5))
    assert features(Headless(), data(5), "error").shape == (5, 3)
    with pytest.raises(ValueError, match="`model` .*linear layer"):
        features(
            nn.Sequential(nn.Conv1d(4, 3, 1), nn.Flatten()),
            TensorDataset(torch.rand(2, 4, 1), torch.zeros(2).long()),
        )


def test_hooks_come_off_after_an_error() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        features(model, data(5, width=7))
    assert not any(module._forward_hooks for module in model)


@pytest.mark.parametrize("name", ["fcnet", "lenet"])
def test_the_papers_networks_have_a_penultimate_layer(name: str) -> None:
    given = TensorDataset(torch.rand(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64))
    found = features(getattr(models, name)(), given)
    assert found.shape == (3, {"fcnet": 256, "lenet": 84}[name])


def test_resnet18_has_512_features() -> None:
    pytest.importorskip("torchvision")
    given = TensorDataset(torch.rand(3, 3, 32, 32), torch.zeros(3, dtype=torch.int64))
    assert features(models.resnet18(10), given).shape == (3, 512)


def test_wrong_words_and_nothing_are_named() -> None:
    with pytest.raises(ValueError, match="`kind` .*'last'"):
        features(network(), data(), "last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sample"):
        features(network(), data(0))


@pytest.mark.parametrize("targets", [torch.eye(3)[torch.arange(6) % 3], torch.rand(6)])
def test_errors_of_no_classes_are_refused(targets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`targets` .*\(B,\)"):
        features(nn.Linear(4, 3), TensorDataset(torch.randn(6, 4), targets), "error")
