"""LAMP as a GPU computes it, against LAMP on a CPU."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drophot import magnitude_prune
from drophot.prune import device_lamp

NUMBERS = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.5, -3.0, 6e-8, 6e4, 1e-30, 1e30])


def removed(model: nn.Module, calls: list[tuple[float, float]], *, on_gpu: bool) -> list[Any]:
    """The masks of several prunings, or the error of one."""
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(device_lamp, "is_used", lambda _: on_gpu)
        for ratio, kept in calls:
            try:
                masks = magnitude_prune(model, ratio, scope="lamp", min_kept=kept)
            except ValueError as error:  # too many weights are zero
                found.append(str(error))
            else:
                found.append({name: mask.tolist() for name, mask in masks.items()})
    return found


def assert_equal(model: nn.Module, calls: list[tuple[float, float]]) -> None:
    twin = copy.deepcopy(model)
    assert removed(model, calls, on_gpu=True) == removed(twin, calls, on_gpu=False)


@pytest.mark.filterwarnings("ignore:`ratio")
@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=25)
def test_the_same_weights_are_removed_ties_included(
    data: st.DataObject, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(4, 5), nn.Linear(2, 1)).to(dtype)
    for weight in model.parameters():
        if data.draw(st.booleans()):
            values = data.draw(st.lists(NUMBERS, min_size=weight.numel(), max_size=weight.numel()))
            weight.data.copy_(torch.tensor(values).view(weight.shape))
    ratio = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.95]))
    calls = [(ratio, data.draw(st.sampled_from([0.0, 0.04]))), (min(ratio + 0.1, 0.95), 0.0)]
    assert_equal(model, calls)


def test_layers_whose_scores_are_far_from_the_threshold_stay_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cpu: list[str] = []
    rank = device_lamp.DeviceRanking._on_cpu

    def listed(self: Any, names: list[str], remove: int) -> dict[str, int]:
        on_cpu.extend(names)
        return rank(self, names, remove)

    monkeypatch.setattr(device_lamp.DeviceRanking, "_on_cpu", listed)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 30))
    assert_equal(copy.deepcopy(model), [(0.3, 0.0), (0.8, 0.1)])
    assert on_cpu == []
    twice = nn.Sequential(model[0], nn.Linear(40, 30), model[2])
    twice[1].weight.data.copy_(model[2].weight.data)
    assert_equal(twice, [(0.5, 0.0)])
    assert on_cpu in ([], ["1.weight", "2.weight"]), "each score occurs in both"


def test_one_wait_for_each_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # By tensor: with a default device, torch calls the method twice for each call.
    copies: dict[int, torch.Tensor] = {}
    original = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda t: (copies.setdefault(id(t), t), original(t))[1]
    )
    for layers in (2, 9):
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers)))
        values = {name: weight.detach() for name, weight in model.named_parameters()}
        ranking = device_lamp.DeviceRanking(values, {})
        assert sum(ranking.counts([*values], 8 * layers).values()) == 8 * layers
        assert len(copies) == 2
        copies.clear()


def test_not_where_torch_sums_deterministically(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lamp, "_is_gpu", lambda _: True)
    assert device_lamp.is_used([torch.ones(2)])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not device_lamp.is_used([torch.ones(2)])
