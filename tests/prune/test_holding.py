"""Removed weights are zero after any step, and what no optimiser holds is said."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from drophot import Masks, magnitude_prune

NOT_FINITE = [float("inf"), -float("inf"), float("nan")]
wild = st.one_of(st.floats(width=16), st.sampled_from([*NOT_FINITE, -0.0, 3e38, 1e-45]))


@given(
    values=st.lists(wild, min_size=8, max_size=8),
    kept=st.lists(st.booleans(), min_size=8, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_whatever_a_step_leaves_the_removed_become_zero_and_the_kept_stay(
    values: list[float], kept: list[bool], dtype: torch.dtype
) -> None:
    layer = nn.Linear(4, 2, dtype=dtype)
    mask = torch.tensor(kept).view(2, 4)
    layer.weight.data.copy_(mask)
    masks = Masks.from_zeros(layer)
    left = torch.tensor(values, dtype=torch.float64).to(dtype).view(2, 4)
    layer.weight.data.copy_(left)
    masks.zero()
    assert torch.equal(layer.weight[~mask], torch.zeros(int((~mask).sum()), dtype=dtype))
    assert not layer.weight[~mask].signbit().any()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(layer.weight[mask].view(bits), left[mask].view(bits)), "not a bit"


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, RMSprop])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_gradients_that_are_not_finite_bring_nothing_back(
    kind: type[Optimizer], value: float
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 4, 3))
    masks = magnitude_prune(model, 0.5)
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    with masks.hold(optimizer):
        for gradient in (1.0, value, 1.0, 1.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
            for name, mask in masks.items():
                assert (model.get_parameter(name)[~mask] == 0).all()


def test_a_step_that_overflows() -> None:
    model = nn.Linear(4, 4, bias=False)
    masks = magnitude_prune(model, 0.5)
    optimizer = SGD(model.parameters(), lr=1e38)
    with masks.hold(optimizer):
        model(torch.full((2, 4), 1e10)).pow(2).sum().backward()
        optimizer.step()
    assert not model.weight[masks["weight"]].isfinite().all()
    assert (model.weight[~masks["weight"]] == 0).all()


def _channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _other_memory(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _loaded(model: nn.Module) -> None:
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [lambda m: m.double(), lambda m: m.bfloat16(), _channels_last, _other_memory, _loaded],
    ids=["float64", "bfloat16", "channels last", "other memory", "loaded"],
)
def test_a_model_that_changes_while_it_is_held(change: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 2))
    masks = magnitude_prune(model, 0.5)
    optimizer = SGD(model.parameters(), lr=0.1)
    with masks.hold(optimizer):
        for turn in range(4):
            if turn == 2:
                change(model)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1.0)
            optimizer.step()
            for name, mask in masks.items():
                weight = model.get_parameter(name)
                assert (weight[~mask] == 0).all()
                assert (weight[mask] != 0).any()


# --- several optimisers of one model -----------------------------------------------------------


def two() -> tuple[nn.Sequential, Masks, dict[str, Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    masks = magnitude_prune(model, 0.8)
    parts = {"backbone": model[0], "head": model[2]}
    return model, masks, {n: AdamW(part.parameters(), lr=0.1) for n, part in parts.items()}


def step(model: nn.Module, *optimizers: Optimizer) -> None:
    model(torch.randn(4, 8)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("order", [("backbone", "head"), ("head", "backbone")])
@pytest.mark.parametrize("held", [("backbone", "head"), ("head", "backbone")])
def test_both_held_are_exact_and_silent(order: tuple[str, ...], held: tuple[str, ...]) -> None:
    model, masks, optimizers = two()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in held:
            masks.hold(optimizers[name])
        for _ in range(5):
            step(model, *(optimizers[name] for name in order))
    assert Masks.from_zeros(model).sparsity == 0.8
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("order", [("backbone", "head"), ("head", "backbone")])
def test_one_held_of_two_is_said_at_the_first_step_and_once(order: tuple[str, ...]) -> None:
    model, masks, optimizers = two()
    loose = int((~masks["0.weight"]).sum())
    masks.hold(optimizers["head"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(model, *(optimizers[name] for name in order))
    (said,) = (str(warning.message) for warning in caught)
    assert f"{loose} of 128" in said
    assert "`0.weight`" in said
    masks.hold(optimizers["backbone"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, *optimizers.values())


def test_a_hold_that_was_lifted_no_longer_counts() -> None:
    model, masks, optimizers = two()
    with masks.hold(optimizers["backbone"]):
        pass
    masks.hold(optimizers["head"])
    with pytest.warns(UserWarning, match="`0.weight`"):
        step(model, *optimizers.values())


@pytest.mark.parametrize("why", ["frozen", "dense"])
def test_what_cannot_grow_back_is_not_said(why: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masks = magnitude_prune(model, 0.5)
    if why == "frozen":
        model[0].requires_grad_(False)
    else:
        masks.load_state_dict({**masks, "0.weight": torch.ones(8, 8, dtype=torch.bool)})
    optimizer = SGD(model[1].parameters(), lr=0.1)
    with warnings.catch_warnings(), masks.hold(optimizer):
        warnings.simplefilter("error")
        step(model, optimizer)


def test_masks_that_are_held_can_be_copied_and_a_copy_is_held_by_nobody() -> None:
    model, masks, optimizers = two()
    masks.hold(optimizers["head"])
    masks.hold(optimizers["backbone"])
    step(model, *optimizers.values())
    for twin, copied in (
        copy.deepcopy((model, masks)),
        pickle.loads(pickle.dumps((model, masks))),
    ):
        copied.zero()
        assert copied.sparsity == 0.8
        optimizer = SGD(twin.parameters(), lr=0.1)
        with copied.hold(optimizer):
            step(twin, optimizer)
        assert Masks.from_zeros(twin).sparsity == 0.8


def test_the_cure_for_a_copy_is_one() -> None:
    model, masks, _ = two()
    twin = copy.deepcopy(model)
    optimizer = SGD(twin.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"`optimizer`.*masks\.hold\(optimizer, model=copy\)"):
        masks.hold(optimizer)
    zeros = Masks.from_zeros(twin)
    zeros.apply()  # its head was emptied
    with zeros.hold(optimizer):
        step(twin, optimizer)
    assert Masks.from_zeros(twin).sparsity == 0.8


@pytest.mark.slow
def test_a_compiled_step_is_held() -> None:
    model, masks, _ = two()
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.1))
    with masks.hold(optimizer):
        compiled: Any = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            model(torch.randn(4, 8)).square().sum().backward()
            compiled()
            assert Masks.from_zeros(model).sparsity == 0.8


def trained(model: nn.Module, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.randn(4, 8)).pow(2).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("moved", [False, True])
def test_a_layer_that_joins_the_optimizer_later_is_held_too(moved: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    masks = magnitude_prune(model, 0.5)
    optimizer = SGD(model[1].parameters(), lr=0.1)
    with masks.hold(optimizer), warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, optimizer)
        model[0].requires_grad_(True)
        if moved:  # into a group that is there
            optimizer.param_groups[0]["params"] += list(model[0].parameters())
        else:
            optimizer.add_param_group({"params": list(model[0].parameters())})
        for _ in range(2):
            trained(model, optimizer)
            for name, mask in masks.items():
                assert (model.get_parameter(name)[~mask] == 0).all()


def test_a_layer_that_another_optimizer_trains_later_is_warned_about() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    masks = magnitude_prune(model, 0.5)
    optimizer = SGD(model[1].parameters(), lr=0.1)
    masks.hold(optimizer)
    trained(model, optimizer)
    model[0].requires_grad_(True)
    other = SGD(model[0].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"`0\.weight`"):
        trained(model, optimizer, other)


class OtherState(torch.optim.SGD):
    """Adds state that does not belong to single elements, as Adafactor, Shampoo and others do."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for weight in self.param_groups[0]["params"]:
            state, size = self.state[weight], len(weight)
            state.setdefault("exp_avg_sq_row", torch.ones(size))
            state.setdefault("precond_0", torch.ones(size, size))
            state.setdefault("GG", [torch.ones(size, size)] * 2)
            state.setdefault("state1", torch.ones_like(weight, dtype=torch.uint8))
            state.setdefault("exp_avg", torch.ones_like(weight))
            state.setdefault("step", 1)
        return result


def test_state_that_does_not_belong_to_elements_is_left_as_it_is() -> None:
    model = nn.Linear(6, 6, bias=False)  # square, as are the matrices of its dimensions
    optimizer = OtherState(model.parameters(), lr=0.1)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    masks = magnitude_prune(model, 0.5)
    with masks.hold(optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
        state = optimizer.state[model.weight]
        kept = [state["exp_avg_sq_row"], state["precond_0"], *state["GG"], state["state1"]]
        assert all((tensor == 1).all() for tensor in kept)
        assert torch.equal(state["exp_avg"] != 0, masks["weight"])
        assert not model.weight[~masks["weight"]].any()
