"""A star means what it says: how often tables in which nothing is real have one all the same."""

from typing import Any

import numpy as np
import pytest
from helpers.record import one
from numpy.typing import NDArray

from drophot.report import differences
from drophot.stats import compare, paired

scipy_stats = pytest.importorskip("scipy.stats", reason="`scipy` is not installed")

# Seeds; test images and the accuracy that every mode has.
SEEDS = [2, 3, 5]
SETS = [(48, 0.95), (100, 0.97), (360, 0.95), (1000, 0.98), (10_000, 0.98), (1000, 0.8)]


def p_values(counts: NDArray[np.int64], tests: int, *, known: bool) -> NDArray[np.float64]:
    """Of two modes less the first, as `compare` has them; counts are (..., 3, cells, seeds)."""
    d = (counts[..., 1:, :, :] - counts[..., :1, :, :]) / tests
    n = d.shape[-1]
    variance = d.var(-1, ddof=1)
    equal = variance < 1e-20
    variance = variance + (1 / tests**2 if known else equal)
    p = 2 * scipy_stats.t.sf(abs(d.mean(-1)) / np.sqrt(variance / n), n - 1)
    return p if known else np.where(equal, 1.0, p)


def records(counts: NDArray[np.int64], tests: int, *, known: bool) -> list[Any]:
    return [
        one(
            mode=("random", "high", "low")[mode],
            prune_ratio=0.1 * cell,
            seed=seed,
            finetuned_accuracy=int(counts[mode, cell, seed]) / tests,
            test_samples=tests * known,
        )
        for mode, cell, seed in np.ndindex(*counts.shape)
    ]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("seeds", SEEDS)
def test_the_p_values_of_this_test_are_those_of_the_library(seeds: int, known: bool) -> None:
    chance = np.random.default_rng(seeds)
    for tests, accuracy in SETS:
        counts = chance.binomial(tests, accuracy, (3, 9, seeds))
        rows = compare(records(counts, tests, known=known), against="random")
        found = np.array([row.p_value for row in rows]).reshape(2, 9)
        np.testing.assert_allclose(found, p_values(counts, tests, known=known), rtol=1e-6)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("tests", "accuracy"), SETS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_a_table_without_an_effect_has_a_star_in_5_percent_at_most(
    seeds: int, tests: int, accuracy: float, known: bool
) -> None:
    chance = np.random.default_rng(0)
    for cells in (1, 9):
        counts = chance.binomial(tests, accuracy, (5000, 3, cells, seeds))
        p = p_values(counts, tests, known=known).reshape(5000, -1)
        starred = np.mean(p.min(1) * p.shape[1] < 0.05)  # Holm's first
        assert starred < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 5000)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_one_test_image_more_or_less_makes_no_star(seeds: int) -> None:
    """Runs that differ by one image at most: nearly all differences are tied."""
    chance = np.random.default_rng(0)
    counts = chance.integers(0, 2, (5000, 3, 9, seeds))
    p = p_values(counts, 1000, known=True).reshape(5000, -1)
    assert np.mean(p.min(1) * p.shape[1] < 0.05) < 0.01


@pytest.mark.parametrize("known", [True, False])
def test_tables_of_few_counts(known: bool) -> None:
    chance = np.random.default_rng(0)
    starred = 0
    for _ in range(20):
        counts = chance.binomial(48, 0.95, (3, 9, 2))
        starred += "*" in differences(records(counts, 48, known=known))
    assert starred <= 1


def test_a_clear_difference_of_equal_counts_has_its_star_where_the_size_is_known() -> None:
    counts = np.array([[[300, 310, 305]], [[280, 290, 285]], [[300, 310, 305]]])
    high, low = compare(records(counts, 360, known=True), against="random")
    assert high.p_holm < 0.05
    assert high.interval[0] < high.difference < high.interval[1] < 0
    assert low.p_value == 1
    assert low.interval[0] < 0 < low.interval[1]
    high, low = compare(records(counts, 360, known=False), against="random")
    assert high.p_value == low.p_value == 1
    assert np.isnan([*high.interval, high.effect_size]).all()
    text = differences(records(counts, 360, known=False))
    assert "−5.56" in text
    assert "*" not in text
    assert "nan" not in text


def test_where_the_spread_is_wide_a_test_image_is_nothing() -> None:
    chance = np.random.default_rng(0)
    counts = chance.binomial(10_000, 0.9, (3, 1, 8))
    for row, mode in zip(
        compare(records(counts, 10_000, known=True), against="random"), (1, 2), strict=True
    ):
        plain = paired(counts[mode, 0] / 10_000, counts[0, 0] / 10_000)
        assert row.p_value == pytest.approx(plain.p_value, rel=2e-3)
        assert row.interval == pytest.approx(plain.interval, abs=2e-6)
