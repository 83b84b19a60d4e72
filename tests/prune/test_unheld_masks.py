"""What is removed and can grow back, or would be trained at zero, is said."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from drophot import Masks, magnitude_prune
from drophot.prune import Schedule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


# --- a hold that has ended -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masks", "schedule"])
def test_a_hold_that_has_ended_is_not_entered_again(kind: str) -> None:
    """One handle for several epochs, each in a `with` block."""
    model = network()
    holder = magnitude_prune(model, 0.5) if kind == "masks" else Schedule(model, [0.5], every=1)
    optimizer = Adam(model.parameters())
    handle = holder.hold(optimizer)
    with handle:
        step(model, optimizer)
    with pytest.raises(RuntimeError, match=r"has ended.*`hold`"), handle:
        pass
    handle.remove()  # which does no harm
    with holder.hold(optimizer):
        step(model, optimizer)
    assert Masks.from_zeros(model).sparsity == 0.5


# --- pruned further while held -------------------------------------------------------------------


def test_pruning_further_while_older_masks_are_held_is_said_once() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with magnitude_prune(model, 0.5).hold(optimizer):
        step(model, optimizer)
        newer = magnitude_prune(model, 0.75)
        with pytest.warns(UserWarning, match=r"`hold`.*48 .*`hold` of the newer masks"):
            step(model, optimizer)
        step(model, optimizer)
    assert Masks.from_zeros(model) != newer


def test_pruning_further_in_the_right_order_is_silent() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = magnitude_prune(model, 0.5)
    handle = masks.hold(optimizer)
    for ratio in (0.625, 0.75):
        step(model, optimizer)
        masks = magnitude_prune(model, ratio)
        handle.remove()
        handle = masks.hold(optimizer)
    step(model, optimizer)
    with magnitude_prune(model, 0.875).hold(optimizer):  # the outer one goes on
        step(model, optimizer)
        assert Masks.from_zeros(model).sparsity == 0.875
    step(model, optimizer)


def test_masks_of_two_holds_are_held_together() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    first, last = SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)
    with masks.hold(first), masks.hold(last):
        step(model, last)
        newer = magnitude_prune(model, 0.75)
        with newer.hold(first), newer.hold(last):
            step(model, last)
            first.step()


def test_weights_that_were_loaded_since_are_not_removed() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with magnitude_prune(model, 0.5).hold(optimizer):
        before = copy.deepcopy(model.state_dict())
        magnitude_prune(model, 0.9)  # to see what that would do
        model.load_state_dict(before)
        step(model, optimizer)


def test_a_schedule_prunes_further_while_it_is_held() -> None:
    model = network()
    schedule = Schedule(model, [0.25, 0.5, 0.75], every=1)
    optimizer = SGD(model.parameters(), lr=0.1)
    with schedule.hold(optimizer):
        for _ in range(4):
            step(model, optimizer)
    assert Masks.from_zeros(model) == schedule.masks


# --- frozen weights ------------------------------------------------------------------------------


def test_frozen_weights_that_came_back_are_said_at_the_end() -> None:
    """As by merging an adapter into them."""
    model = network()
    masks = magnitude_prune(model, 0.5)
    frozen, trained = model.get_parameter("0.weight"), [model.get_parameter("2.weight")]
    frozen.requires_grad_(False)
    handle = masks.hold(SGD(trained, lr=0.1))
    frozen.add_(0.1)
    with pytest.raises(RuntimeError, match=r"no longer zero.*`0.weight`"):
        handle.remove()
    masks.apply()
    with masks.hold(SGD(trained, lr=0.1)):
        pass


# --- layers that start at zero -------------------------------------------------------------------


class Adapted(nn.Module):
    """A pruned layer with a low-rank term, whose second factor starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 8)
        magnitude_prune(self.base, 0.5)
        self.base.requires_grad_(False)
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.lora_B = nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def test_masks_of_zeros_that_would_freeze_a_layer_are_said_when_they_are_held() -> None:
    model = Adapted()
    optimizer = SGD([*model.lora_A.parameters(), *model.lora_B.parameters()], lr=0.1)
    masks = Masks.from_zeros(model)  # to look at them says nothing
    with pytest.warns(UserWarning, match=r"`lora_B\.weight` at zero.*`skip`"):
        handle = masks.hold(optimizer)
    handle.remove()
    with Masks.from_zeros(model, skip=["lora_B"]).hold(optimizer):
        step(model, optimizer)
    assert model.lora_B.weight.all()
    assert Masks.from_zeros(model.base).sparsity == 0.5


@pytest.mark.parametrize("cure", ["apply", "frozen", "known"])
def test_layers_that_were_emptied_are_held_in_silence(cure: str) -> None:
    model = network()
    model[2].weight.data.mul_(1e-6)
    magnitude_prune(model, 0.5)
    assert not model[2].weight.any()
    optimizer = SGD(model.parameters(), lr=0.1)
    if cure != "known":
        model = copy.deepcopy(model)
        optimizer = SGD(model.parameters(), lr=0.1)
    if cure == "frozen":
        model[2].requires_grad_(False)
    masks = Masks.from_zeros(model)
    if cure == "apply":
        masks.apply()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with masks.hold(optimizer):
            step(model, optimizer)


# --- comparing masks -----------------------------------------------------------------------------


def test_masks_are_equal_if_they_keep_the_same_weights() -> None:
    model, other = network(), network()
    masks, same = magnitude_prune(model, 0.5), magnitude_prune(other, 0.5)
    assert masks == same
    assert masks == same.state_dict()
    assert masks != magnitude_prune(network(), 0.25)
    assert masks != magnitude_prune(network(), 0.5, skip=["0"])
    assert masks != magnitude_prune(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)), 0)
    assert masks != dict.fromkeys(masks, 1)
    assert masks != None  # noqa: E711
