"""Pruning by an importance function of the user, against sorts of all importances."""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from drophot.prune import Importance, Masks, Schedule, cubic, magnitude_prune

SCOPES: list[Any] = ["global", "layer", "erk", "lamp"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ratios = st.floats(0, 0.99)


def magnitude(name: str, weight: Tensor) -> Tensor:
    return weight.abs()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 4))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.dim() > 1}


def drawn(model: nn.Module, seed: int, *, signed: bool = True) -> dict[str, Tensor]:
    """Random importances by name, float64."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for name, w in weights_of(model).items()
    }
    return values if signed else {name: value.abs() for name, value in values.items()}


def fixed(values: Mapping[str, Tensor]) -> Importance:
    def given(name: str, weight: Tensor) -> Tensor:
        return values[name]

    return given


def quietly(function: Callable[..., Masks], *args: Any, **options: Any) -> Masks:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


@given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 100), ratio=ratios, signed=st.booleans())
def test_the_lowest_of_all_importances_are_removed(
    dtype: torch.dtype, seed: int, ratio: float, signed: bool
) -> None:
    model = network()
    before = weights_of(model)
    values = {name: v.to(dtype) for name, v in drawn(model, seed, signed=signed).items()}
    masks = magnitude_prune(model, ratio, importance=fixed(values))
    ordered = np.sort(np.concatenate([v.double().numpy().ravel() for v in values.values()]))
    remove = int(np.floor(ratio * len(ordered) + 0.5))
    assert sum(int((~mask).sum()) for mask in masks.values()) == remove
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), before[name] * mask)
        found = values[name].double()
        if remove:
            assert mask[found > ordered[remove - 1]].all()
            assert not mask[found < ordered[remove - 1]].any()


@given(seed=st.integers(0, 100), ratio=ratios)
def test_equal_importances_are_removed_evenly_from_all_layers(seed: int, ratio: float) -> None:
    model = network()
    values = {name: torch.full(w.shape, -2.5) for name, w in weights_of(model).items()}
    masks = magnitude_prune(model, ratio, importance=fixed(values))
    total = sum(mask.numel() for mask in masks.values())
    remove = int(np.floor(ratio * total + 0.5))
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    removed = (~kept).nonzero()[:, 0]
    assert len(removed) == remove
    distances = {int(after - before) for before, after in pairwise(removed)}
    assert distances <= {total // max(remove, 1), total // max(remove, 1) + 1}


@settings(max_examples=30)
@given(scope=st.sampled_from(["layer", "erk"]), seed=st.integers(0, 100), ratio=ratios)
def test_a_layer_loses_as_many_as_by_magnitude_and_its_lowest(
    scope: Any, seed: int, ratio: float
) -> None:
    model = network()
    values = drawn(model, seed)
    masks = magnitude_prune(model, ratio, scope=scope, importance=fixed(values))
    for name, mask in magnitude_prune(network(), ratio, scope=scope).items():
        remove = int((~mask).sum())
        lowest = values[name].flatten().argsort()[:remove]
        assert (~masks[name]).flatten().nonzero()[:, 0].tolist() == sorted(lowest.tolist())


@settings(max_examples=30)
@given(seed=st.integers(0, 100), ratio=st.floats(0, 0.95))
def test_lamp_normalises_importances_as_it_does_magnitudes(seed: int, ratio: float) -> None:
    model = network()
    values = drawn(model, seed, signed=False)
    remove = int(np.floor(ratio * sum(v.numel() for v in values.values()) + 0.5))
    expected = references.lamp_removed({n: v.flatten().tolist() for n, v in values.items()}, remove)
    masks = magnitude_prune(model, ratio, scope="lamp", importance=fixed(values))
    for name, mask in masks.items():
        lowest = values[name].flatten().argsort()[: expected[name]]
        assert (~mask).flatten().nonzero()[:, 0].tolist() == sorted(lowest.tolist())


@given(seed=st.integers(0, 100), row=st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_a_pattern_keeps_the_most_important_of_each_group(seed: int, row: list[int]) -> None:
    model = nn.Linear(8, 1)
    values = {"weight": torch.tensor([row], dtype=torch.float32)}
    masks = magnitude_prune(model, 0.5, pattern="2:4", importance=fixed(values))
    expected = references.kept_of_each([float(value) for value in row], 2, 4)
    assert masks["weight"].tolist() == [expected]
    lower = {"weight": values["weight"] - 10}  # the same order, all negative
    assert magnitude_prune(nn.Linear(8, 1), 0.5, pattern="2:4", importance=fixed(lower)) == masks


OPTIONS = st.one_of(
    st.fixed_dictionaries({
        "scope": st.sampled_from(["global", "lamp"]),
        "min_kept": st.floats(0, 0.2),
    }),
    st.fixed_dictionaries({"scope": st.sampled_from(["layer", "erk"])}),
)


@settings(max_examples=30)
@given(
    options=OPTIONS,
    shares=st.lists(st.floats(0, 0.7), min_size=1, max_size=3).map(sorted),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([0, 1, 4]),
    zero=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_magnitude_as_an_importance_gives_the_masks_of_the_built_in_one(
    options: dict[str, Any],
    shares: list[float],
    dtype: torch.dtype,
    levels: int,
    zero: bool,
    seed: int,
) -> None:
    built_in, own = network(seed).to(dtype), network(seed).to(dtype)
    for model in (built_in, own):
        for layer in model:
            if isinstance(layer, nn.Linear) and levels:  # many ties and zeros
                layer.weight.data.mul_(levels * 3).round_()
        if zero:
            nn.init.zeros_(model[3].weight)
    for ratio in shares:
        try:
            expected = quietly(magnitude_prune, built_in, ratio, **options)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)[:20]):
                quietly(magnitude_prune, own, ratio, importance=magnitude, **options)
            return
        assert quietly(magnitude_prune, own, ratio, importance=magnitude, **options) == expected
        assert all(map(torch.equal, own.parameters(), built_in.parameters()))


@settings(max_examples=30)
@given(seed=st.integers(0, 100), dtype=st.sampled_from(DTYPES))
def test_the_same_with_a_pattern(seed: int, dtype: torch.dtype) -> None:
    one, other = network(seed).to(dtype), network(seed).to(dtype)
    expected = magnitude_prune(one, 0.5, pattern="2:4")
    assert magnitude_prune(other, 0.5, pattern="2:4", importance=magnitude) == expected
    expected = magnitude_prune(one, 0.75, pattern="1:4")
    assert magnitude_prune(other, 0.75, pattern="1:4", importance=magnitude) == expected


@pytest.mark.parametrize("scope", SCOPES)
def test_a_removed_weight_stays_removed_whatever_its_importance(scope: Any) -> None:
    model = network()
    before = magnitude_prune(model, 0.4)

    def high_where_removed(name: str, weight: Tensor) -> Tensor:
        return weight.abs().masked_fill(~before[name], torch.inf)

    after = magnitude_prune(model, 0.6, scope=scope, importance=high_where_removed)
    assert all(not (mask & ~before[name]).any() for name, mask in after.items())
    assert after.sparsity == pytest.approx(0.6, abs=0.01)
    assert torch.equal(model[0].weight != 0, after["0.weight"])


def test_a_pattern_brings_no_removed_weight_back() -> None:
    model = nn.Linear(8, 4)
    before = magnitude_prune(model, 0.75, pattern="1:4")
    with pytest.warns(UserWarning, match="2:4.*16.*24"):
        after = magnitude_prune(
            model, 0.5, pattern="2:4", importance=lambda _, w: (w == 0).to(w.dtype)
        )
    assert after == before


def test_the_function_sees_each_parameter_once_with_its_gradient() -> None:
    model = network()
    model(torch.ones(3, 8)).sum().backward()
    calls = []

    def checked(name: str, weight: nn.Parameter) -> Tensor:
        assert weight is model.get_parameter(name)
        assert not torch.is_grad_enabled()
        calls.append(name)
        return saliency(name, weight)

    expected = {name: saliency(name, p).detach() for name, p in model.named_parameters()}
    masks = magnitude_prune(model, 0.5, importance=checked)
    assert calls == list(masks) == ["0.weight", "2.weight", "3.weight"]
    removed = torch.cat([expected[name][~mask] for name, mask in masks.items()])
    kept = torch.cat([expected[name][mask] for name, mask in masks.items()])
    assert removed.max() <= kept.min()


def test_what_the_function_returns_is_not_changed() -> None:
    model = network()
    values = {name: w.clone() for name, w in weights_of(model).items()}
    before = deepcopy(values)
    magnitude_prune(model, 0.5, importance=fixed(values))
    assert all(torch.equal(value, before[name]) for name, value in values.items())
    scratch = torch.empty(12 * 8)  # one buffer for all layers

    def reused(name: str, weight: Tensor) -> Tensor:
        return torch.abs(weight, out=scratch[: weight.numel()].view(weight.shape))

    expected = magnitude_prune(network(), 0.5)
    assert magnitude_prune(network(), 0.5, importance=reused) == expected
    signed = network()
    masks = magnitude_prune(signed, 0.5, importance=lambda _, weight: weight)
    kept = [signed.get_parameter(name)[mask] for name, mask in masks.items()]
    removed = [before[name][~mask] for name, mask in masks.items()]
    assert torch.cat(kept).min() >= torch.cat(removed).max()


@pytest.mark.parametrize(
    "layout", [lambda w: w[:, :1].abs().expand_as(w), lambda w: w.abs().t().contiguous().t()]
)
def test_any_strides_will_do(layout: Callable[[Tensor], Tensor]) -> None:
    model = network()
    values = {name: layout(w).contiguous() for name, w in weights_of(model).items()}
    expected = magnitude_prune(network(), 0.5, importance=fixed(values))
    assert magnitude_prune(model, 0.5, importance=lambda _, w: layout(w)) == expected


def test_weights_in_another_memory_format() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 3)
    other = deepcopy(model).to(memory_format=torch.channels_last)
    masks = magnitude_prune(other, 0.5, importance=magnitude)
    assert masks == magnitude_prune(model, 0.5)
    assert torch.equal(other.weight, model.weight)


def test_a_minimum_holds_and_the_total_is_exact() -> None:
    model = network()
    values = drawn(model, 0)
    values["3.weight"] -= 100  # without the minimum it would lose everything
    masks = magnitude_prune(model, 0.5, min_kept=0.25, importance=fixed(values))
    assert int(masks["3.weight"].sum()) == 8
    assert masks.sparsity == 0.5
    assert not magnitude_prune(network(), 0.5, importance=fixed(values))["3.weight"].any()


def test_a_layer_of_zeros_is_ranked_if_its_importances_are_not_all_zero() -> None:
    def zero_head() -> nn.Sequential:
        model = network()
        nn.init.zeros_(model[3].weight)
        return model

    with pytest.warns(UserWarning, match=r"`3\.weight`.*32"):
        masks = magnitude_prune(zero_head(), 0.5, importance=magnitude)
    assert masks["3.weight"].all()
    assert masks.sparsity == pytest.approx(0.5, abs=0.01)
    values = drawn(network(), 0, signed=False)
    with pytest.warns(UserWarning, match=r"leaves \d+ .*`3\.weight`"):
        masks = magnitude_prune(zero_head(), 0.5, importance=fixed(values))
    ordered = torch.cat([value.flatten() for value in values.values()]).sort().values
    assert torch.equal(masks["3.weight"], values["3.weight"] > ordered[len(ordered) // 2 - 1])


def test_a_layer_that_is_not_important_at_all_is_removed_first() -> None:
    model = network()
    values = drawn(model, 0, signed=False)
    values["2.weight"].zero_()
    masks = magnitude_prune(model, 0.5, importance=fixed(values))
    assert not masks["2.weight"].any()
    assert masks.sparsity == 0.5


# --- in a schedule, and held ---------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    inputs = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 8, generator=inputs)).square().mean().backward()
        optimizer.step()


def saliency(name: str, weight: nn.Parameter) -> Tensor:
    return weight.abs() if weight.grad is None else (weight * weight.grad).abs()


def test_a_schedule_ranks_again_at_each_pruning_and_holds() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    seen: list[Masks] = []

    def recorded(name: str, weight: nn.Parameter) -> Tensor:
        if name == "0.weight":
            seen.append(deepcopy(schedule.masks) if seen else masks)
        return saliency(name, weight)

    masks = Masks.from_zeros(network())
    schedule = Schedule(model, cubic(0.8, 4), every=3, importance=recorded)
    with schedule.hold(optimizer):
        train(model, optimizer, 10)
    assert schedule.finished
    assert schedule.masks.sparsity == pytest.approx(0.8, abs=0.003)
    assert len(seen) == 4
    for before, after in pairwise([*seen, schedule.masks]):
        assert before.sparsity < after.sparsity
        assert all(not (mask & ~before[name]).any() for name, mask in after.items())
    assert Masks.from_zeros(model) == schedule.masks


def test_a_schedule_by_magnitude_is_the_built_in_one() -> None:
    found = []
    for importance in (None, magnitude):
        model = network()
        nn.init.zeros_(model[3].weight)  # joins when it has been trained
        optimizer = torch.optim.AdamW(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = Schedule(model, cubic(0.8, 4), every=3, importance=importance)
            with schedule.hold(optimizer):
                train(model, optimizer, 10)
        found.append((schedule.masks, weights_of(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][name]) for name, weight in found[0][1].items())


def test_a_state_is_of_a_schedule_with_the_same_importance() -> None:
    schedule = Schedule(network(), [0.2, 0.5], every=2, importance=saliency)
    state = schedule.state_dict()
    assert state["importance"] == "saliency"
    Schedule(network(), [0.2, 0.5], every=2, importance=saliency).load_state_dict(state)
    for other in (None, magnitude):
        with pytest.raises(ValueError, match=r"importance.*saliency"):
            Schedule(network(), [0.2, 0.5], every=2, importance=other).load_state_dict(state)


def test_masks_by_an_importance_hold() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(model, optimizer, 3)
    masks = magnitude_prune(model, 0.7, importance=saliency)
    with masks.hold(optimizer):
        train(model, optimizer, 5)
    assert Masks.from_zeros(model) == masks


# --- what is refused -----------------------------------------------------------------------------


class Constant:
    """An importance function that is an object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, name: str, weight: Tensor) -> Any:
        return self.value if name == "2.weight" else weight.abs()


HALF = torch.full((8, 12), 0.5)


@pytest.mark.parametrize(
    ("value", "options", "error", "match"),
    [
        (None, {}, TypeError, "NoneType"),
        (HALF.numpy(), {}, TypeError, "ndarray"),
        (0.5, {}, TypeError, "float"),
        (HALF.sum(1), {}, ValueError, r"\(8, 12\).*\(8,\)"),
        (HALF[:, :1], {}, ValueError, r"\(8, 12\).*\(8, 1\)"),
        (HALF.long(), {}, TypeError, "int64"),
        (HALF > 0, {}, TypeError, "bool"),
        (HALF.to(torch.complex64), {}, TypeError, "complex64"),
        (HALF.to(torch.float8_e5m2), {}, TypeError, "float8"),
        (HALF.to_sparse(), {}, ValueError, "sparse"),
        (HALF.to("meta"), {}, ValueError, "meta"),
        (HALF.log().log(), {}, ValueError, "96"),
        (HALF.clone().index_fill_(0, torch.tensor([1]), torch.inf), {}, ValueError, "12"),
        (HALF - 1, {"scope": "lamp"}, ValueError, r"lamp.*-0\.5"),
    ],
)
def test_what_the_function_must_not_return(
    value: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(error, match=rf"`Constant`.*{match}.*`2\.weight`"):
        magnitude_prune(model, 0.5, importance=Constant(value), **options)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_error_names_the_function() -> None:
    def no_tensor(name: str, weight: Tensor) -> Any:
        return None

    with pytest.raises(TypeError, match=r"no_tensor.*`0\.weight`"):
        magnitude_prune(network(), 0.5, importance=no_tensor)


def test_an_importance_is_a_function() -> None:
    wrong: Any = "taylor"
    with pytest.raises(TypeError, match="`importance`.*taylor"):
        magnitude_prune(network(), 0.5, importance=wrong)
    with pytest.raises(TypeError, match="`importance`.*taylor"):
        Schedule(network(), [0.5], every=1, importance=wrong)


def test_an_error_of_the_function_leaves_the_model_alone() -> None:
    def fails(name: str, weight: Tensor) -> Tensor:
        if name == "3.weight":
            raise RuntimeError("no gradient")
        return weight.abs()

    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no gradient"):
        magnitude_prune(model, 0.5, importance=fails)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
