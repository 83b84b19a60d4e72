from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given
from hypothesis import strategies as st

from drophot import Stratified, select
from drophot._core.ratios import num_kept

tied = st.lists(st.integers(-3, 4).map(float), min_size=1, max_size=40)
scattered = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)
any_scores = st.one_of(tied, scattered)
hards = st.sampled_from(["high", "low"])
seeds = st.integers(0, 2**64 - 1)


@given(tied, st.floats(0.01, 1), st.integers(1, 12), st.floats(0, 0.9), hards, seeds)
def test_stratified_equals_the_definition(
    scores: list[float], ratio: float, bins: int, cutoff: float, hard: Any, seed: int
) -> None:
    cutoff = min(cutoff, 1 - ratio)
    found = select(scores, ratio, Stratified(bins, cutoff, hard), seed=seed)
    size = num_kept(len(scores), ratio)
    assert found.tolist() == references.stratified(scores, size, bins, cutoff, hard, seed)


@given(any_scores, st.floats(0.01, 1), st.integers(1, 60), st.floats(0, 0.99), hards)
def test_the_total_is_exact_whatever_the_scores(
    scores: list[float], ratio: float, bins: int, cutoff: float, hard: Any
) -> None:
    found = select(scores, ratio, Stratified(bins, min(cutoff, 1 - ratio), hard))
    assert len(found) == num_kept(len(scores), ratio)
    assert (found.diff() > 0).all()
    assert found[0] >= 0
    assert found[-1] < len(scores)


@given(any_scores, st.floats(0.01, 0.8), hards)
def test_the_hardest_are_left_out(scores: list[float], ratio: float, hard: Any) -> None:
    found = select(scores, ratio, Stratified(cutoff=0.2, hard=hard)).numpy()
    values = np.array(scores, dtype=np.float32) * (1 if hard == "high" else -1)
    remaining = max(len(found), len(scores) - int(0.2 * len(scores) + 0.5))
    assert values[found].max() <= np.sort(values)[remaining - 1]


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2)), min_size=1, max_size=60),
    st.floats(0.05, 1),
    st.floats(0, 0.5),
    seeds,
)
def test_with_targets_it_is_done_within_each_class_and_the_total_stays_exact(
    samples: list[tuple[int, int]], ratio: float, cutoff: float, seed: int
) -> None:
    scores, targets = [float(s) for s, _ in samples], [t for _, t in samples]
    cutoff = min(cutoff, 1 - ratio)
    mode = Stratified(bins=5, cutoff=cutoff, hard="low")
    found = select(scores, ratio, mode, targets=targets, seed=seed).tolist()
    size, classes = num_kept(len(samples), ratio), sorted(set(targets))
    sizes = references.largest_remainders([targets.count(c) for c in classes], size, seed)
    expected: list[int] = []
    for c, share in zip(classes, sizes, strict=True):
        inside = [i for i, t in enumerate(targets) if t == c]
        if share:
            expected += references.stratified(scores, share, 5, cutoff, "low", seed, inside)
    assert found == sorted(expected)
    assert len(found) == size


def test_rare_difficulties_are_kept_whole_and_common_ones_thinned_out() -> None:
    scores = torch.cat([torch.zeros(1000), torch.arange(1, 11).repeat(5)])
    found = scores[select(scores, 100 / 1050, Stratified(bins=11))].long()
    assert found.bincount().tolist() == [50] + 10 * [5]


def test_every_sample_of_a_bin_has_the_same_chance() -> None:
    rounds, counts = 400, torch.zeros(40)
    scores = torch.tensor(20 * [0.0] + 20 * [1.0])
    for seed in range(rounds):
        counts[select(scores, 0.25, Stratified(bins=2), seed=seed)] += 1
    expected, spread = rounds / 4, (rounds * 0.25 * 0.75) ** 0.5
    assert (counts - expected).abs().max() < 4.5 * spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8])
def test_any_dtype_gives_the_same(dtype: torch.dtype) -> None:
    scores = torch.randint(0, 90, (500,), generator=torch.Generator().manual_seed(0))
    expected = select(scores.float(), 0.3, Stratified(cutoff=0.1))
    assert torch.equal(select(scores.to(dtype), 0.3, Stratified(cutoff=0.1)), expected)


@given(
    st.lists(st.integers(-300, 300).map(float), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.sampled_from([700, 4096, 10**9]),
    seeds,
)
def test_bins_without_a_sample_cost_nothing_and_change_nothing(
    scores: list[float], ratio: float, bins: int, seed: int
) -> None:
    """More bins than whole numbers: each has its own, however many are empty."""
    found = select(scores, ratio, Stratified(bins), seed=seed)
    size = num_kept(len(scores), ratio)
    assert found.tolist() == references.stratified(scores, size, 700, 0.0, "high", seed)


def test_the_widest_range_of_floats_has_bins() -> None:
    largest = float(np.finfo(np.float64).max)
    scores = torch.tensor([-largest, 0.0, 0.0, largest], dtype=torch.float64)
    found = select(scores, 0.75, Stratified(bins=3))
    assert {0, 3} < set(found.tolist())
    least = float(np.nextafter(0, 1))
    tiny = torch.tensor([0.0, 0.0, least, least], dtype=torch.float64)
    assert len(select(tiny, 0.5, Stratified(bins=3))) == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bins": 0}, ValueError, "`bins` .*0"),
        ({"bins": True}, TypeError, "`bins` .*True"),
        ({"bins": 10**10}, ValueError, "`bins` .*10,000,000,000"),
        ({"cutoff": True}, TypeError, "`cutoff` .*True"),
        ({"bins": 2.5}, TypeError, "`bins` .*2.5"),
        ({"cutoff": 1}, ValueError, r"`cutoff` .*\[0, 1\).* 1"),
        ({"cutoff": -0.1}, ValueError, "`cutoff` .*-0.1"),
        ({"cutoff": "much"}, TypeError, "`cutoff` .*'much'"),
        ({"hard": "big"}, ValueError, "`hard` .*'big'"),
    ],
)
def test_wrong_settings_are_named(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Stratified(**settings)


def test_a_cutoff_that_leaves_too_little_is_named_and_one_that_leaves_enough_is_not() -> None:
    with pytest.raises(ValueError, match="`cutoff`.*cutoff=0.6.*ratio=0.5"):
        select([1.0, 2.0], 0.5, Stratified(cutoff=0.6))
    assert len(select(np.arange(10), 0.7, Stratified(cutoff=0.3))) == 7
    assert len(select(np.arange(3), 0.9, Stratified(cutoff=0.1))) == 3


def test_scores_without_a_range_are_named() -> None:
    with pytest.raises(ValueError, match="`scores`.* infinite"):
        select([1.0, float("inf"), 2.0], 0.5, Stratified())
    # The cutoff comes first, as it may be what takes them away.
    assert select([1.0, float("inf"), 2.0], 2 / 3, Stratified(cutoff=0.33)).tolist() == [0, 2]


def test_whole_numbers_fall_into_the_bins_that_they_bound() -> None:
    for seed in range(20):
        found = select(torch.arange(101), 50 / 101, Stratified(bins=50), seed=seed)
        assert [min(number // 2, 49) for number in found.tolist()] == list(range(50))


def test_with_targets_the_cutoffs_ties_fall_by_the_position_among_all_samples() -> None:
    scores, targets = torch.zeros(12), torch.arange(12) % 2
    found = select(scores, 0.5, Stratified(cutoff=0.5), targets=targets, seed=4)
    assert torch.equal(found, select(scores, 0.5, "low", targets=targets, seed=4))
