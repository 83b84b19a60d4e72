"""How a share is divided among layers: ERK, LAMP, a minimum for each."""

from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from math import ceil, floor, prod

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from drophot.prune import Masks, magnitude_prune
from drophot.prune.lamp import LampScores
from drophot.prune.layer_sparsity import erk_counts

shapes = st.lists(
    st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5
)
ratios = st.floats(0, 0.999)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=2), nn.Linear(16, 40), nn.Linear(40, 5)
    )


def has_lamp_scores(weight: Tensor, expected: Sequence[float], rtol: float) -> bool:
    """Whether the scores in ascending order are the expected ones."""
    layer, scores = LampScores(weight), np.sort(expected)
    return all(
        layer.count(score * (1 + rtol), below=False) >= np.searchsorted(scores, score, "right")
        and layer.count(score * (1 - rtol), below=True) <= np.searchsorted(scores, score, "left")
        for score in np.unique(scores).tolist()
    )


def kept(masks: Masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


@given(shapes, ratios)
def test_erk_is_the_papers_and_exact(dimensions: list[tuple[int, ...]], ratio: float) -> None:
    named = {str(number): shape for number, shape in enumerate(dimensions)}
    total = sum(map(prod, dimensions))
    remove = floor(ratio * total + 0.5)
    found = erk_counts(named, remove)
    assert sum(found.values()) == remove
    expected = references.erk_removed(named, ratio)
    for name, count in found.items():
        assert 0 <= count <= prod(named[name])
        assert abs(count - expected[name]) < 1 + 1e-6
    # What is left over goes to the largest remainders of what is kept.
    kept = {name: prod(shape) - expected[name] for name, shape in named.items()}
    rest = {name: share - floor(share + 1e-9) for name, share in kept.items()}
    more = {name: prod(named[name]) - found[name] > floor(kept[name] + 1e-9) for name in named}
    least = min((rest[name] for name in named if more[name]), default=1.0)
    room = [name for name in named if not more[name] and kept[name] < prod(named[name]) - 1e-6]
    assert all(rest[name] <= least + 1e-6 for name in room)


@given(
    st.lists(
        st.lists(st.integers(-20, 20), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 10**6),
)
def test_lamp_scores_are_the_papers(layers: list[list[int]], seed: int) -> None:
    for layer in layers:
        weights = torch.tensor(layer, dtype=torch.float64)[torch.randperm(len(layer))]
        expected = references.lamp_scores(weights.tolist())
        assert has_lamp_scores(weights, expected, rtol=1e-12)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.1, 0.5, 0.8, 0.95]))
def test_lamp_removes_the_least_scores_of_all_layers(seed: int, ratio: float) -> None:
    model = network(seed)
    weights = {name: w.detach().clone() for name, w in model.named_parameters() if w.dim() > 1}
    layers = {name: w.double().flatten().tolist() for name, w in weights.items()}
    remove = floor(ratio * sum(map(len, layers.values())) + 0.5)
    expected = references.lamp_removed(layers, remove)
    masks = magnitude_prune(model, ratio, scope="lamp")
    for name, mask in masks.items():
        assert int((~mask).sum()) == expected[name]
        magnitudes = weights[name].abs()
        assert magnitudes[mask].min() >= magnitudes[~mask].max() if (~mask).any() else True
    assert sum(int((~mask).sum()) for mask in masks.values()) == remove


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_lamp_of_numbers_whose_squares_are_none(scale: float) -> None:
    weights = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = references.lamp_scores(weights.tolist())
    assert has_lamp_scores(weights * scale, expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 1e-44), (torch.bfloat16, 1e-38), (torch.float64, 5e-324)]
)
def test_the_least_number_beside_the_largest_is_no_zero(dtype: torch.dtype, least: float) -> None:
    model = nn.Linear(10, 10, dtype=dtype)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(dtype).max)
        model.weight[:5] = least
    masks = magnitude_prune(model, 0.1, scope="lamp")
    assert masks.sparsity == 0.1
    assert LampScores(model.weight.masked_fill(~masks["weight"], least)).count(0, below=False) == 0


def test_lamp_of_more_weights_than_a_block_with_runs_of_equal_ones() -> None:
    """The scores by the definition, one sorted array and no blocks."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 200, generator=generator).mul_(8).round_().div_(8)
    weight[:5] = 0
    sizes, inverse, numbers = np.unique(weight.abs(), return_inverse=True, return_counts=True)
    rest = np.cumsum((sizes.astype(np.float64) ** 2 * numbers)[::-1])[::-1]
    expected = (sizes.astype(np.float64) ** 2 / rest)[inverse].ravel()
    assert has_lamp_scores(weight, expected.tolist(), rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e18])
def test_lamp_does_not_look_at_the_scale_of_a_layer(scale: float) -> None:
    model, other = network(), network()
    other[2].weight.data.mul_(scale)
    some, same = (magnitude_prune(m, 0.7, scope="lamp") for m in (model, other))
    assert all(torch.equal(mask, same[name]) for name, mask in some.items())
    scaled = network()
    scaled[2].weight.data.mul_(scale)
    globally = magnitude_prune(scaled, 0.7)
    assert scale == 1.0 or kept(globally) != kept(same)


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
@settings(max_examples=30)
@given(ratio=ratios, seed=st.integers(0, 50))
def test_every_budget_is_exact_and_takes_the_least_of_each_layer(
    scope: str, ratio: float, seed: int
) -> None:
    model = network(seed)
    before = deepcopy(model)
    masks = magnitude_prune(model, ratio, scope=scope)
    sizes = [mask.numel() for mask in masks.values()]
    removed = [int((~mask).sum()) for mask in masks.values()]
    if scope == "layer":
        assert removed == [floor(ratio * size + 0.5) for size in sizes]
    else:
        assert sum(removed) == floor(ratio * sum(sizes) + 0.5)
    for name, mask in masks.items():
        weight = before.get_parameter(name).detach()
        assert torch.equal(model.get_parameter(name), weight * mask)
        if mask.any() and not mask.all():
            assert weight[mask].abs().min() >= weight[~mask].abs().max()
    assert list(masks) == [f"{number}.weight" for number in range(4)]


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
def test_pruning_on_removes_more_and_brings_nothing_back(scope: str) -> None:
    model = network()
    before = magnitude_prune(model, 0.4, scope=scope)
    after = magnitude_prune(model, 0.7, scope=scope)
    for name, mask in after.items():
        assert not (mask & ~before[name]).any()
    assert after.sparsity == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
def test_layers_of_zeros_and_of_equal_weights(scope: str) -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[1].weight)
    with pytest.warns(UserWarning, match=r"`0.weight`.*Masks.from_zeros"):
        masks = magnitude_prune(model, 0.5, scope=scope)
    assert masks.sparsity == 0.5
    if scope in ("global", "lamp"):
        assert masks["0.weight"].all()
    else:
        assert kept(masks) == {f"{number}.weight": 50 for number in range(3)}
    everything = nn.Linear(4, 4)
    nn.init.zeros_(everything.weight)
    with pytest.warns(UserWarning, match="`ratio=0.25`.*12 .*`weight`"):
        masks = magnitude_prune(everything, 0.25, scope=scope)
    assert masks.sparsity == 0.25
    assert masks["weight"].sum(1).tolist() == [3, 3, 3, 3], "spread evenly"


def test_a_global_ranking_empties_a_layer_unless_told_not_to() -> None:
    def model() -> nn.Sequential:
        made = network()
        made[3].weight.data.mul_(1e-4)
        return made

    assert kept(magnitude_prune(model(), 0.8))["3.weight"] == 0
    masks = magnitude_prune(model(), 0.8, min_kept=0.1)
    assert kept(masks)["3.weight"] == 20
    total = sum(mask.numel() for mask in masks.values())
    assert sum(kept(masks).values()) == total - floor(0.8 * total + 0.5)


@pytest.mark.parametrize("scope", ["global", "lamp"])
@settings(max_examples=30)
@given(
    ratio=st.floats(0, 0.99),
    share=st.floats(0.001, 0.99),
    seed=st.integers(0, 20),
    scales=st.lists(st.sampled_from([1e-3, 1.0, 1e3]), min_size=4, max_size=4),
)
def test_the_minimum_holds_and_the_total_is_exact(
    scope: str, ratio: float, share: float, seed: int, scales: list[float]
) -> None:
    model = network(seed)
    for layer, scale in zip(model, scales, strict=True):
        layer.weight.data.mul_(scale)
    before = deepcopy(model.state_dict())
    sizes = {name: w.numel() for name, w in before.items() if w.dim() > 1}
    least = {name: ceil(Fraction(repr(share)) * size) for name, size in sizes.items()}
    remove = floor(ratio * sum(sizes.values()) + 0.5)
    if remove > sum(sizes[name] - least[name] for name in sizes):
        with pytest.raises(ValueError, match="`ratio`.*`min_kept`.*min_kept="):
            magnitude_prune(model, ratio, scope=scope, min_kept=share)
        assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
        return
    masks = magnitude_prune(model, ratio, scope=scope, min_kept=share)
    assert sum(int((~mask).sum()) for mask in masks.values()) == remove
    assert all(count >= least[name] for name, count in kept(masks).items())


def test_without_a_layer_below_it_the_minimum_changes_nothing() -> None:
    plain, floored = network(), network()
    some, same = magnitude_prune(plain, 0.5), magnitude_prune(floored, 0.5, min_kept=0.01)
    assert all(torch.equal(mask, same[name]) for name, mask in some.items())


@pytest.mark.parametrize("scope", ["global", "lamp"])
@pytest.mark.parametrize("older", [False, True])
def test_a_minimum_keeps_zeros_but_not_those_of_an_older_mask(scope: str, older: bool) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[:, 10:] = 0  # 50 of 200 are left
    if older:
        Masks.from_zeros(model).apply()
        masks = magnitude_prune(model, 0.45, min_kept=0.5, scope=scope)
    else:
        with pytest.warns(UserWarning, match="`ratio=0.45`.*50 .*`3.weight`"):
            masks = magnitude_prune(model, 0.45, min_kept=0.5, scope=scope)
    assert kept(masks)["3.weight"] == (50 if older else 100)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(kept(masks).values()) == total - floor(0.45 * total + 0.5)


def test_the_minimum_is_a_floor_in_small_layers_too() -> None:
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(6, 6), nn.Linear(1, 1))
    for layer, scale in ((model[1], 1e-6), (model[2], 1e-9)):
        nn.init.uniform_(layer.weight, 0.5 * scale, scale)
    masks = magnitude_prune(model, 0.9, min_kept=0.013)
    assert kept(masks)["1.weight"] == 1  # 0.468
    assert kept(masks)["2.weight"] == 1
    assert masks.sparsity == floor(0.9 * 40_037 + 0.5) / 40_037
    # 0.1 of 30 are 3, although 0.1 * 30 is a little more.
    thirty = nn.Linear(6, 5)
    assert magnitude_prune(thirty, 0.9, min_kept=0.1).sparsity == 0.9


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scope": "uniform"}, ValueError, '`scope`.*"global", "layer", "erk", "lamp".*uniform'),
        ({"min_kept": 1.0}, ValueError, "`min_kept` .*1.0"),
        ({"min_kept": "some"}, TypeError, "`min_kept` .*some"),
        ({"min_kept": 0.1, "scope": "layer"}, ValueError, "`min_kept`.*min_kept=0.1"),
        ({"min_kept": 0.1, "scope": "erk"}, ValueError, "`min_kept`.*min_kept=0.1"),
        ({"min_kept": 0.3}, ValueError, "`ratio`.*`min_kept`.*min_kept=0.3"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, error: type, message: str) -> None:
    model = network()
    before: dict[str, Tensor] = deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        magnitude_prune(model, 0.8, **settings)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
