"""Channels are removed alike under any default device."""

from copy import deepcopy

import torch

from drophot.models import lenet
from drophot.structured import Budget, plan_channels, prune_channels


def test_a_default_device_changes_nothing() -> None:
    model, images = lenet(), torch.randn(2, 1, 28, 28)
    other, budgeted = deepcopy(model), deepcopy(model)
    expected = prune_channels(model, 0.5, images)
    fitted = plan_channels(budgeted, example_inputs=images, to=Budget(parameters=20_000))
    with torch.device("meta"):
        found = prune_channels(other, 0.5, images)
        plan = plan_channels(budgeted, example_inputs=images, to=Budget(parameters=20_000))
    assert plan == fitted
    for name, kept in expected.kept_channels.items():
        assert torch.equal(found.kept_channels[name], kept)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
