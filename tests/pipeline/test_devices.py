"""Runs whose data, models and device are not on the same device."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from helpers.other_device import DEVICE, Held, other_device
from torch import nn
from torch.utils.data import TensorDataset

from drophot import DropHot
from drophot.models import fcnet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Weights of any class but torch's own are refused.
    monkeypatch.setattr("drophot.prune.prunable_weights._check_weight", lambda *_: None)
    with other_device():
        yield


def data_on(device: torch.device) -> TensorDataset:
    noise = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(32, 4, generator=noise), torch.arange(32) % 4
    return TensorDataset(inputs.to(device), targets.to(device))


def network(device: torch.device) -> nn.Module:
    return fcnet(in_features=4, hidden=32, num_classes=4).to(device)


def drop_hot(
    train: torch.device, test: torch.device, factory: torch.device, device: torch.device
) -> DropHot:
    return DropHot(
        partial(network, factory),
        data_on(train),
        data_on(test),
        data_ratio=0.5,
        mode="high",
        prune_ratio=0.5,
        score_epochs=1,
        train_epochs=1,
        batch_size=8,
        device=device,
    )


def test_the_stand_in_refuses_tensors_of_two_devices() -> None:
    there = torch.ones(3, device=DEVICE)
    assert isinstance(there, Held)
    assert (there.device, (there + 1).sum().item(), there.cpu().device) == (DEVICE, 6, CPU)
    with pytest.raises(RuntimeError, match="same device"):
        _ = there + torch.ones(3)


@pytest.mark.parametrize(
    ("train", "test", "factory", "device"),
    [
        (DEVICE, DEVICE, CPU, DEVICE),
        (DEVICE, DEVICE, DEVICE, DEVICE),
        (DEVICE, CPU, CPU, DEVICE),
        (CPU, DEVICE, DEVICE, CPU),
        (DEVICE, DEVICE, CPU, CPU),
    ],
)
def test_data_and_models_may_be_on_any_device(
    train: torch.device, test: torch.device, factory: torch.device, device: torch.device
) -> None:
    runs = [drop_hot(train, test, factory, device), drop_hot(CPU, CPU, CPU, CPU)]
    for run in runs:
        run.score()
        run.select()
        run.train()
    found, expected = runs
    assert {parameter.device for parameter in found.model.parameters()} == {device}
    assert torch.equal(found.indices, expected.indices)
    assert found.trained_accuracy == expected.trained_accuracy
