"""A zero is not a removed weight: layers that start at zero, and models that are sparse already."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drophot import DropHot, Masks, magnitude_prune

ALL = ["global", "layer", "erk", "lamp"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5), nn.Linear(5, 4))


def blank(*layers: int) -> nn.Sequential:
    model = network()
    for layer in layers:
        nn.init.zeros_(model[layer].weight)
    return model


def removed(masks: Masks) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return deepcopy(model.state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("scope", ["global", "lamp"])
@pytest.mark.parametrize("settings", [{}, {"min_kept": 0.1}])
def test_a_ranking_leaves_out_a_layer_of_zeros(scope: Any, settings: dict[str, float]) -> None:
    model = blank(2)
    with pytest.warns(UserWarning, match=r"`2.weight` \(100 weights\).*Masks.from_zeros") as seen:
        masks = magnitude_prune(model, 0.5, scope=scope, **settings)
    assert [warning.filename for warning in seen] == [__file__]
    assert masks["2.weight"].all()
    assert sum(removed(masks).values()) == 160  # of 320: the others lose all of it


@pytest.mark.parametrize("scope", ALL)
def test_at_ratio_0_nothing_is_masked(scope: Any) -> None:
    model = blank(0, 3)
    with pytest.warns(UserWarning, match=r"`ratio=0`.*220 .*`0.weight`, `3.weight`"):
        masks = magnitude_prune(model, 0, scope=scope)
    assert masks.sparsity == 0


@pytest.mark.parametrize("scope", ["global", "lamp"])
def test_what_the_others_cannot_give_is_refused(scope: Any) -> None:
    model = blank(0)
    before = state(model)
    with pytest.raises(ValueError, match="`ratio`.*160 .*120 .*`0.weight`"):
        magnitude_prune(model, 0.5, scope=scope)
    with pytest.raises(ValueError, match="`ratio`.*112 .*min_kept=0.1.*`0.we"):
        magnitude_prune(model, 0.35, scope=scope, min_kept=0.1)
    assert equal(before, state(model))


@pytest.mark.filterwarnings("ignore:.*Masks.from_zeros")
@pytest.mark.parametrize("scope", ALL)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3])
def test_a_layer_of_zeros_learns_under_its_masks(ratio: float, scope: Any) -> None:
    model = blank(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = magnitude_prune(model, ratio, scope=scope)
    inputs = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    with masks.hold(optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), inputs[:, :4].argmax(1)).backward()
            optimizer.step()
    assert masks["3.weight"].sum() > 10
    assert torch.equal(model[3].weight != 0, masks["3.weight"])


def test_it_is_ranked_as_soon_as_it_is_not_zero() -> None:
    model = blank(3)
    with pytest.warns(UserWarning, match="`3.weight`"):
        magnitude_prune(model, 0.1)
    nn.init.normal_(model[3].weight, std=1e-6)
    masks = magnitude_prune(model, 0.3)
    assert removed(masks)["3.weight"] == 20
    assert masks.sparsity == 0.3


@given(st.integers(0, 90), st.floats(0, 0.9), st.sampled_from(ALL))
def test_zeros_are_masked_up_to_the_number_asked_for(zeros: int, ratio: float, scope: Any) -> None:
    model = nn.Linear(10, 10)
    torch.manual_seed(0)
    with torch.no_grad():
        model.weight.uniform_(0.5, 1)
        model.weight.view(-1)[torch.randperm(100)[:zeros]] = 0
    before = model.weight.detach().clone()
    other = deepcopy(model)
    asked = int(ratio * 100 + 0.5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        masks = magnitude_prune(model, ratio, scope=scope)
        again = magnitude_prune(model, ratio, scope=scope)
        elsewhere = magnitude_prune(other, ratio, scope=scope)
    mask = masks["weight"]
    assert int((~mask).sum()) == asked
    assert int((mask & (before == 0)).sum()) == max(zeros - asked, 0)
    assert torch.equal(again["weight"], mask), "asking again removes nothing new"
    assert torch.equal(elsewhere["weight"], mask), "the choice does not depend on chance"
    messages = {str(warning.message) for warning in seen}
    assert len(messages) == (zeros > asked)
    assert all(f" {zeros - asked} weights" in text for text in messages)
    assert all("Masks.from_zeros" in text for text in messages)
    assert int((~Masks.from_zeros(model)["weight"]).sum()) == max(zeros, asked)


@pytest.mark.parametrize("scope", ALL)
def test_zeros_that_are_masked_are_spread_evenly(scope: Any) -> None:
    model = nn.Linear(100, 100)
    with torch.no_grad():
        model.weight[:50] = 0
    with pytest.warns(UserWarning, match="3,750 "):
        masks = magnitude_prune(model, 0.125, scope=scope)
    assert masks["weight"][:50].sum(1).tolist() == [75] * 50


# --- older masks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "lamp"])
@pytest.mark.parametrize("keep", [True, False], ids=["masks kept", "masks dropped"])
def test_a_layer_that_an_earlier_pruning_emptied_stays_empty(scope: Any, keep: bool) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    first = magnitude_prune(model, 0.3)
    assert not first["3.weight"].any()
    if not keep:
        del first
    masks = magnitude_prune(model, 0.6, scope=scope)
    assert not masks["3.weight"].any()
    assert masks.sparsity == 0.6


def test_less_than_an_earlier_pruning_removed_is_said() -> None:
    model = network()
    first = magnitude_prune(model, 0.75)
    before = state(model)
    with pytest.warns(UserWarning, match="`ratio=0.25` .*80 .*240 ") as w:
        second = magnitude_prune(model, 0.25)
    assert [warning.filename for warning in w] == [__file__]
    assert equal(dict(first), dict(second))
    assert equal(before, state(model))


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ["global", "erk", "lamp"])
def test_another_scope_is_exact_too(first: Any, second: Any) -> None:
    model = network()
    before = magnitude_prune(model, 0.5, scope=first)
    masks = magnitude_prune(model, 0.55, scope=second)
    assert sum(removed(masks).values()) == 176
    assert all(not (mask & ~before[name]).any() for name, mask in masks.items())
    again = magnitude_prune(model, 0.55, scope=second)
    assert equal(dict(masks), dict(again))


def test_layer_by_layer_after_a_ranking_says_what_is_over() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    before = removed(magnitude_prune(model, 0.5))
    sizes = {"0.weight": 200, "2.weight": 100, "3.weight": 20}
    expected = {name: max(size // 2, before[name]) for name, size in sizes.items()}
    total = sum(expected.values())
    with pytest.warns(UserWarning, match=f"scope='layer'.*160 .*{total} "):
        assert removed(magnitude_prune(model, 0.5, scope="layer")) == expected


def test_other_weights_have_no_older_masks() -> None:
    """The same object for another run, from its own start, with a layer at zero."""
    model = blank(3)
    start = state(model)
    nn.init.normal_(model[3].weight, std=1e-6)
    assert not magnitude_prune(model, 0.5)["3.weight"].any()
    model.load_state_dict(start)
    with pytest.warns(UserWarning, match="`3.weight`"):
        assert magnitude_prune(model, 0.5)["3.weight"].all()


def hold(model: nn.Module, masks: Masks) -> None:
    with pytest.warns(UserWarning, match="`3.weight`.* zero"):
        masks.hold(torch.optim.SGD(model.parameters(), lr=0.1))


def load(model: nn.Module, masks: Masks) -> None:
    masks.load_state_dict(masks.state_dict())


def apply(_: nn.Module, masks: Masks) -> None:
    masks.apply()


@pytest.mark.parametrize("use", [hold, load, apply])
def test_masks_of_zeros_that_are_used_are_older_masks(
    use: Callable[[nn.Module, Masks], None],
) -> None:
    """A pruned model from a file: one of its layers was emptied."""
    model = blank(3)
    use(model, Masks.from_zeros(model))
    masks = magnitude_prune(model, 0.5)
    assert not masks["3.weight"].any()
    assert masks.sparsity == 0.5


def test_to_look_at_zeros_changes_nothing() -> None:
    model = blank(3)
    assert Masks.from_zeros(model).sparsity == 20 / 320
    with pytest.warns(UserWarning, match="`3.weight`"):
        assert magnitude_prune(model, 0.5)["3.weight"].all()


def test_masks_go_with_the_model_to_another_dtype_and_a_copy_has_none() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    magnitude_prune(model, 0.3)
    other = deepcopy(model)
    model.double()
    assert not magnitude_prune(model, 0.6)["3.weight"].any()
    with pytest.warns(UserWarning, match=r"`3.weight` .*Masks.from_zeros\(model\).apply\(\)"):
        assert magnitude_prune(other, 0.6)["3.weight"].all()


def test_what_is_left_of_channels_has_nothing_removed() -> None:
    class Fresh(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
            with torch.no_grad():
                self[0].weight[:, 0] = 0

    data = TensorDataset(
        torch.randn(12, 3).index_fill(1, torch.tensor([0]), 0), torch.arange(12) % 2
    )
    settings = {"train_epochs": 1, "finetune_epochs": 1, "score_epochs": 1, "device": "cpu"}
    run = DropHot(
        Fresh,
        data,
        data,
        data_ratio=0.5,
        mode="random",
        prune_ratio=0.5,
        structured=True,
        **settings,
    )
    run.run()
    assert run.masks is not None
    assert run.masks.sparsity == 0
