"""Statistics, against SciPy's own tests and the definitions."""

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.record import one
from hypothesis import assume, given
from hypothesis import strategies as st

from drophot import Record, Scored
from drophot.records import fingerprint
from drophot.stats import (
    Comparison,
    compare,
    estimate,
    forgotten_by_pruning,
    holm,
    paired,
    seeds_needed,
    stability,
)

scipy_stats = pytest.importorskip("scipy.stats", reason="`scipy` is not installed")

accuracies = st.floats(0, 1).map(lambda x: round(x, 4))
several = st.lists(accuracies, min_size=2, max_size=12)
pairs = st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=12)
shares = st.sampled_from([0.5, 0.9, 0.95, 0.99])


# --- one mean ---------------------------------------------------------------------------------


@given(several, shares)
def test_an_estimate_is_scipys(values: list[float], confidence: float) -> None:
    assume(np.std(values) > 1e-6)
    found = estimate(values, confidence)
    peer = scipy_stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert found.interval == pytest.approx((peer.low, peer.high))


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    chance = np.random.default_rng(0)
    held = [
        low <= 3 <= high
        for low, high in (estimate(chance.normal(3, 2, 4)).interval for _ in range(2000))
    ]
    assert 0.935 < np.mean(held) < 0.965


def test_a_single_value_has_no_interval() -> None:
    found = estimate([0.5])
    assert (found.n, found.mean) == (1, 0.5)
    assert all(math.isnan(x) for x in (found.std, *found.interval))


def test_equal_values_have_an_interval_of_a_point() -> None:
    assert estimate([0.5, 0.5, 0.5]).interval == (0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "confidence", "words"),
    [
        ([], 0.95, "`values`.*at least one"),
        ([0.5, math.nan], 0.95, "`values`.*nan"),
        ([math.inf], 0.95, "`values`.*inf"),
        ([0.5, 0.6], 95, r"`confidence`.*95"),
        ([0.5, 0.6], 1.0, r"`confidence`.*1\.0"),
    ],
)
def test_no_estimate_of_wrong_values(values: list[float], confidence: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimate(values, confidence)


# --- a paired difference ------------------------------------------------------------------------


@given(pairs, shares)
def test_a_paired_test_is_scipys(values: list[tuple[float, float]], confidence: float) -> None:
    a, b = map(list, zip(*values, strict=True))
    assume(np.std(np.subtract(a, b)) > 1e-6)
    found, peer = paired(a, b, confidence), scipy_stats.ttest_rel(a, b)
    interval = peer.confidence_interval(confidence)
    assert found.n == len(a)
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b), abs=1e-12)
    assert found.p_value == pytest.approx(peer.pvalue, rel=1e-6)
    assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-12)
    assert found.effect_size == pytest.approx(peer.statistic / math.sqrt(len(a)), rel=1e-6)


def test_tiny_p_values_are_scipys_too() -> None:
    a = [0.95 + 1e-4 * x for x in (1, 2, 3, 4, 5, 6, 7, 8)]
    b = [0.15 + 1e-4 * x for x in (2, 1, 3, 4, 6, 5, 7, 8)]
    found, peer = paired(a, b), scipy_stats.ttest_rel(a, b)
    assert 0 < found.p_value < 1e-20
    assert found.p_value == pytest.approx(peer.pvalue, rel=1e-6)


@given(pairs)
def test_turned_round_it_is_the_same_difference(values: list[tuple[float, float]]) -> None:
    a, b = map(list, zip(*values, strict=True))
    one_way, other = paired(a, b), paired(b, a)
    assert one_way.difference == -other.difference
    assert one_way.p_value == other.p_value
    assert one_way.effect_size == pytest.approx(-other.effect_size, nan_ok=True)
    turned = tuple(-x for x in reversed(other.interval))
    assert one_way.interval == pytest.approx(turned, nan_ok=True)


@given(pairs)
def test_p_is_below_5_percent_just_where_the_interval_leaves_zero_out(
    values: list[tuple[float, float]],
) -> None:
    a, b = map(list, zip(*values, strict=True))
    found = paired(a, b)
    assume(abs(found.p_value - 0.05) > 1e-6)
    low, high = found.interval
    assert (found.p_value < 0.05) == (low > 0 or high < 0)


def test_a_single_pair_is_no_test() -> None:
    found = paired([0.9], [0.8])
    assert found.difference == pytest.approx(0.1)
    assert all(math.isnan(x) for x in (*found.interval, found.p_value, found.effect_size))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0.9, 0.8], [0.9, 0.8]),
        ([0.9, 0.8, 0.3], [0.8, 0.7, 0.2]),
        ([0.8, 0.7, 0.2], [0.9, 0.8, 0.3]),
        ([0.1 + 0.2, 0.3], [0.3, 0.3]),
        ([0.75, 0.5], [0.5, 0.25]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_differences_that_are_all_equal_are_no_finding(a: list[float], b: list[float]) -> None:
    """0.9 - 0.8 and 0.8 - 0.7 are not the same float."""
    assert 0.9 - 0.8 != 0.8 - 0.7
    found = paired(a, b)
    assert found.p_value == 1
    assert all(math.isnan(x) for x in (*found.interval, found.effect_size))
    assert found.difference == pytest.approx(a[0] - b[0], abs=1e-15)


def test_a_small_but_real_spread_is_one() -> None:
    found = paired([0.5, 0.5 + 1e-9, 0.5 - 1e-9], [0.5, 0.5, 0.5])
    assert found.p_value == pytest.approx(1.0)
    assert 0 < found.interval[1] < 1e-8


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="`a` and `b`.*2 and 1"):
        paired([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="`b`.*nan"):
        paired([0.1], [math.nan])


def test_pairing_finds_what_two_samples_hide() -> None:
    """Seeds that differ more than the methods do."""
    chance = np.random.default_rng(1)
    luck = chance.normal(0.9, 0.05, 6)
    a, b = luck + 0.005 + chance.normal(0, 1e-3, 6), luck + chance.normal(0, 1e-3, 6)
    assert paired(a, b).p_value < 0.01 < scipy_stats.ttest_ind(a, b).pvalue


# --- many of them -----------------------------------------------------------------------------


def naive_holm(p_values: list[float]) -> list[float]:
    """By the definition: reject the smallest at alpha / m, the next at alpha / (m - 1), …

    An adjusted value is the least alpha at which the hypothesis is rejected.
    """
    m = len(p_values)
    ranked = sorted(range(m), key=lambda i: p_values[i])
    adjusted = [0.0] * m
    for place, i in enumerate(ranked):
        adjusted[i] = min(1.0, max((m - k) * p_values[ranked[k]] for k in range(place + 1)))
    return adjusted


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_is_its_definition(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(naive_holm(p_values))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms())
def test_laws_of_holm(p_values: list[float], chance: Any) -> None:
    adjusted = holm(p_values)
    bonferroni = [min(1.0, p * len(p_values)) for p in p_values]
    assert all(p <= q <= r for p, q, r in zip(p_values, adjusted, bonferroni, strict=True))
    order = list(range(len(p_values)))
    chance.shuffle(order)
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]
    assert holm([*p_values, math.nan])[:-1] == adjusted, "no test does not count"


def test_known_values_of_holm() -> None:
    """The example of the Wikipedia article on the method."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert math.isnan(holm([math.nan])[0])
    with pytest.raises(ValueError, match=r"`p_values`.*1\.5"):
        holm([0.1, 1.5])


# --- seeds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("effect", "pairs_"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_of_the_textbook(effect: float, pairs_: int) -> None:
    """What G*Power gives for Cohen's small, medium and large effects."""
    assert seeds_needed(effect, 1.0) == pairs_
    assert seeds_needed(-effect / 100, 0.01) == pairs_


@pytest.mark.parametrize(("effect", "power"), [(1.0, 0.8), (2.0, 0.9), (0.7, 0.5)])
def test_so_many_seeds_do_find_it_so_often(effect: float, power: float) -> None:
    chance = np.random.default_rng(0)
    n = seeds_needed(effect, 1.0, power)

    def found(size: int) -> float:
        trials = chance.normal(effect, 1, (20_000, size))
        return float(np.mean(scipy_stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05))

    assert found(n) > power - 0.01
    assert found(n - 1) < power + 0.01


@given(st.floats(1e-4, 10), st.floats(0.05, 0.99), st.sampled_from([0.001, 0.01, 0.05]))
def test_laws_of_seeds(effect: float, power: float, alpha: float) -> None:
    n = seeds_needed(effect, 1.0, power, alpha)
    assert n >= 2
    assert seeds_needed(effect * 1.2, 1.0, power, alpha) <= n
    assert seeds_needed(effect, 1.0, min(0.995, power * 1.1), alpha) >= n
    assert seeds_needed(effect, 1.0, power, alpha / 2) >= n


def power_of(n: int, effect: float, alpha: float) -> float:
    """By the definition: over all spreads that n pairs may show, the chance of a mean beyond t."""
    shift, critical = effect * math.sqrt(n), scipy_stats.t.isf(alpha / 2, n - 1)
    # Quantiles of the spread, in the middle of equal shares; the mean is normal given the spread.
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    spread = scipy_stats.chi.ppf(quantiles, n - 1) / math.sqrt(n - 1)
    return float(np.mean(scipy_stats.norm.cdf(shift - critical * spread)))


@pytest.mark.parametrize("effect", [0.3, 1.0, 3.0, 30.0, 500.0, 1001.0, 1e6, 1e300])
@pytest.mark.parametrize(
    ("power", "alpha"), [(0.8, 0.05), (0.99, 1e-3), (0.5, 1e-6), (0.99, 1e-10), (0.3, 0.5)]
)
def test_seeds_are_the_least_by_the_definition(effect: float, power: float, alpha: float) -> None:
    """Far out too, where SciPy's noncentral t is nan or has no digits."""
    n = seeds_needed(effect, 1.0, power, alpha)
    assert power_of(n, effect, alpha) > power - 1e-4
    assert n == 2 or power_of(n - 1, effect, alpha) < power + 1e-4


def test_seeds_are_the_least_of_millions() -> None:
    n, df = seeds_needed(1e-3, 1.0), np.array([-2, -1]) + 7_848_882
    assert n == 7_848_882
    shift, critical = 1e-3 * np.sqrt(df + 1), scipy_stats.t.isf(0.025, df)
    below, reached = scipy_stats.nct.sf(critical, df, shift)
    assert below < 0.8 <= reached


@given(st.floats(1e6 - 20, 1e6 + 20), st.floats(0, 20), st.sampled_from([1e-6, 0.01, 0.05]))
def test_a_smaller_difference_never_needs_fewer_seeds(
    roughly: float, more: float, alpha: float
) -> None:
    """Where the search gives way to the formula, 1e6 pairs by the normal distribution."""
    z = scipy_stats.norm.isf(alpha / 2) + scipy_stats.norm.ppf(0.8)
    larger, smaller = (float(z / math.sqrt(x)) for x in (roughly, roughly + more))
    assert seeds_needed(larger, 1.0, alpha=alpha) <= seeds_needed(smaller, 1.0, alpha=alpha)


def test_far_ends_of_seeds() -> None:
    assert seeds_needed(0.1, 0.0) == 2
    assert seeds_needed(1e6, 1.0) == 2
    assert seeds_needed(1e300, 1e-300) == 2
    assert seeds_needed(1e-6, 1.0) == pytest.approx(7.849e12, rel=1e-3)
    assert seeds_needed(1e-4, 1.0, power=0.01) == 2, "chance alone finds it more often"
    assert seeds_needed(0.5, 1.0, alpha=1e-20) > seeds_needed(0.5, 1.0, alpha=1e-10)
    for difference, std in [(1e-200, 1.0), (1e-300, 1e300)]:
        with pytest.raises(ValueError, match="`difference`.*1e-100 of `std`"):
            seeds_needed(difference, std)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"difference": 0.0}, r"`difference`.*0\.0"),
        ({"difference": math.nan}, "`difference`"),
        ({"std": -1.0}, r"`std`.*-1\.0"),
        ({"std": math.nan}, "`std`"),
        ({"power": 1.0}, r"`power`.*1\.0"),
        ({"alpha": 0.0}, r"`alpha`.*0\.0"),
    ],
)
def test_seeds_for_wrong_values(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        seeds_needed(**({"difference": 0.1, "std": 0.1} | values))


# --- a grid -------------------------------------------------------------------------------------


def runs(mode: str, accuracies: list[float], **changes: Any) -> list[Record]:
    return [
        one(mode=mode, seed=seed, finetuned_accuracy=accuracy, **changes)
        for seed, accuracy in enumerate(accuracies)
    ]


CELLS = [
    *runs("baseline", [0.90, 0.91, 0.92], keep_ratio=1.0),
    *runs("low", [0.80, 0.82, 0.81]),
    *runs("high", [0.91, 0.92, 0.94]),
    *runs("random", [0.85, 0.86, 0.86]),
]


def test_every_cell_against_the_baseline() -> None:
    rows = compare(CELLS)
    assert [row.mode for row in rows] == ["low", "high", "random"]
    for row, values in zip(
        rows, ([0.80, 0.82, 0.81], [0.91, 0.92, 0.94], [0.85, 0.86, 0.86]), strict=True
    ):
        peer = scipy_stats.ttest_rel(values, [0.90, 0.91, 0.92])
        assert row.p_value == pytest.approx(peer.pvalue)
        assert row.difference == pytest.approx(np.mean(values) - 0.91)
        assert (row.n, row.against, row.measure) == (3, "baseline", "finetuned_accuracy")
    assert [row.p_holm for row in rows] == holm([row.p_value for row in rows])


def test_every_cell_against_the_random_subset() -> None:
    rows = compare(CELLS, against="random")
    assert [row.mode for row in rows] == ["low", "high"], "not the baseline, which is no subset"
    peer = scipy_stats.ttest_rel([0.91, 0.92, 0.94], [0.85, 0.86, 0.86])
    assert rows[1].p_value == pytest.approx(peer.pvalue)
    asked = [replace(record, keep_ratio=0.1) for record in CELLS]
    assert compare(asked, against="random") == rows, "not even of the same ratio"


@pytest.mark.parametrize(
    "change",
    [
        {"prune_ratio": 0.4},
        {"model": "another"},
        {"protocol": "released"},
        {"reinitialized": True},
    ],
    ids=str,
)
def test_a_reference_is_alike_in_everything_else(change: dict[str, Any]) -> None:
    others = [replace(record, **change, finetuned_accuracy=0.1) for record in CELLS]
    assert compare(CELLS + others)[:3] == [
        replace(row, p_holm=other.p_holm)
        for row, other in zip(compare(CELLS), compare(CELLS + others), strict=False)
    ]
    alone = [record for record in others if record.mode == "high"]
    assert len(compare(CELLS + alone)) == 3, "no reference of its own, left out"


@pytest.mark.parametrize("change", [{"keep_ratio": 0.5}, {"equal_steps": True}], ids=str)
def test_the_baseline_serves_every_coreset_the_random_one_its_own(change: dict[str, Any]) -> None:
    others = [replace(record, **change) for record in CELLS if record.mode == "high"]
    assert len(compare(CELLS + others)) == 4
    assert len(compare(CELLS + others, against="random")) == 2


@pytest.mark.parametrize("change", [{"keep_ratio": 0.9999}, {"equal_steps": True}], ids=str)
def test_a_baseline_is_one_whatever_was_asked_of_it(change: dict[str, Any]) -> None:
    """`DropHot(..., data_ratio=0.9999, equal_steps=True)` may keep everything: a baseline."""
    asked = [replace(r, **change) if r.mode == "baseline" else r for r in CELLS]
    assert compare(asked) == compare(CELLS)


def test_of_two_baselines_of_one_seed_the_first_counts() -> None:
    again = [replace(r, equal_steps=True, finetuned_accuracy=0.1) for r in CELLS[:3]]
    later = replace(again[0], seed=3), one(seed=3, mode="high", finetuned_accuracy=0.3)
    assert compare(CELLS + again) == compare(CELLS)
    (_, high, _) = compare([*CELLS, *again, *later])
    assert high.n == 4, "a seed that only the other has counts too"
    assert high.difference == pytest.approx((0.01 + 0.01 + 0.02 + 0.2) / 4)


def test_pairs_go_by_seed_whatever_the_order_and_only_where_both_are() -> None:
    rows = compare(CELLS[::-1])
    assert {row.mode: row.difference for row in rows} == {
        row.mode: row.difference for row in compare(CELLS)
    }
    fewer = [r for r in CELLS if not (r.mode == "high" and r.seed == 0)]
    high = next(row for row in compare(fewer) if row.mode == "high")
    assert high.n == 2
    assert high.difference == pytest.approx(((0.92 - 0.91) + (0.94 - 0.92)) / 2)
    none = [r for r in CELLS if r.mode != "high"] + [
        replace(r, seed=r.seed + 10) for r in CELLS if r.mode == "high"
    ]
    assert [row.mode for row in compare(none)] == ["low", "random"]


def test_another_accuracy() -> None:
    changed = [replace(r, pruned_accuracy=r.finetuned_accuracy / 2) for r in CELLS]
    rows = compare(changed, measure="pruned_accuracy")
    for row, half in zip(compare(CELLS), rows, strict=True):
        assert half.difference == pytest.approx(row.difference / 2)
        assert half.p_value == pytest.approx(row.p_value)


def test_one_seed_is_a_difference_and_no_test() -> None:
    (low, *_) = compare([r for r in CELLS if r.seed == 0])
    assert low.n == 1
    assert low.difference == pytest.approx(-0.1)
    assert math.isnan(low.p_value)
    assert math.isnan(low.p_holm)


@pytest.mark.parametrize(
    ("records", "choices", "words"),
    [
        (CELLS[3:], {}, "`against` .*'baseline'"),
        (CELLS[:9], {"against": "random"}, "`against` .*'random'"),
        (CELLS, {"against": "fresh_subset"}, "`against` .*'fresh_subset'.* baseline, low, high"),
        ([], {}, "at least one record"),
        ([*CELLS, replace(CELLS[4], sparsity=0.1)], {}, "seed 1 twice in lenet: low"),
        (CELLS, {"measure": "best"}, "`measure`.*'best'"),
    ],
)
def test_no_comparison_of_wrong_records(
    records: list[Record], choices: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        compare(records, **choices)


def test_against_any_mode_that_is_there() -> None:
    rows = compare(CELLS, against="low")
    assert [(row.mode, row.against) for row in rows] == [("high", "low"), ("random", "low")]
    assert rows[0].difference == pytest.approx((0.11 + 0.10 + 0.13) / 3)
    fresh = [replace(r, mode="fresh_subset") for r in CELLS if r.mode == "random"]
    crest = [replace(r, mode="crest") for r in CELLS if r.mode == "high"]
    (row,) = compare([*CELLS[:3], *fresh, *crest], against="fresh_subset")
    assert (row.mode, row.n) == ("crest", 3)


@dataclass(frozen=True)
class Own:
    """As much of a user's selector as a comparison needs."""

    needs: tuple[str, ...] = ()
    name: str = "own"


def test_against_a_mode_itself() -> None:
    own = [replace(r, mode="own") if r.mode == "random" else r for r in CELLS]
    for mode in ("own", Own(), Own(needs=("scores",))):
        rows = compare(own, against=mode)
        assert [(row.mode, row.against) for row in rows] == [("low", "own"), ("high", "own")]
        assert rows[0].difference == compare(CELLS, against="random")[0].difference
    balanced = [replace(r, mode="random-balanced") if r.mode == "random" else r for r in CELLS]
    assert len(compare(balanced, against=Scored(mode="random", balanced=True))) == 2
    with pytest.raises(ValueError, match="`against` .*'other'"):
        compare(own, against=Own(name="other"))
    with pytest.raises(TypeError, match="`against` .*3"):
        compare(own, against=3)


def test_a_mode_of_ones_own_serves_all_ways_of_scoring_if_it_needs_none() -> None:
    runs = [replace(r, mode="own") if r.mode == "random" else r for r in CELLS]
    longer = [replace(r, mode="other") for r in runs if r.mode == "high"]
    runs = with_settings(runs) + with_settings(longer, score_epochs=40)
    for mode, modes in (
        (Own(), ["low", "high", "other"]),
        (Own(needs=("targets",)), ["low", "high", "other"]),
        (Own(needs=("scores",)), ["low", "high"]),
        (Own(needs=("model",)), ["low", "high"]),
    ):
        assert [row.mode for row in compare(runs, against=mode)] == modes


def with_settings(records: list[Record], **settings: Any) -> list[Record]:
    """As runs give them: each with its whole configuration."""
    found = []
    for r in records:
        asked = {"mode": r.mode, "data_ratio": r.keep_ratio, "prune_ratio": r.prune_ratio}
        asked |= {"score_epochs": 10, "optimizer": "SGD(lr=0.1)", **settings}
        found.append(replace(r, settings=asked, cell=fingerprint(asked)))
    return found


def test_a_pair_was_asked_for_alike_in_all_but_the_mode() -> None:
    slow = with_settings(CELLS, optimizer="SGD(lr=0.01)")
    slow = [replace(r, finetuned_accuracy=r.finetuned_accuracy / 2) for r in slow]
    both = compare(with_settings(CELLS) + slow)
    assert [row.n for row in both] == [3] * 6, "three seeds, not six"
    assert [row.difference for row in both[:3]] == [row.difference for row in compare(CELLS)]
    assert [row.settings["optimizer"] for row in both] == ["SGD(lr=0.1)"] * 3 + ["SGD(lr=0.01)"] * 3
    alone = [r for r in slow if r.mode != "baseline"]
    assert len(compare(with_settings(CELLS) + alone)) == 3, "no reference of its own, left out"


def test_a_reference_that_needs_no_scores_serves_all_ways_of_scoring() -> None:
    longer = [r for r in with_settings(CELLS, score_epochs=40) if r.mode == "high"]
    assert [row.mode for row in compare(with_settings(CELLS) + longer)].count("high") == 2
    of_random = compare(with_settings(CELLS) + longer, against="random")
    assert [row.mode for row in of_random] == ["low", "high", "high"]
    of_low = compare(with_settings(CELLS) + longer, against="low")
    assert [row.mode for row in of_low] == ["high", "random"], "low was scored for 10 epochs only"
    own = [replace(r, finetuned_accuracy=0.5) for r in with_settings(CELLS[:3], score_epochs=40)]
    high = compare([*with_settings(CELLS), *longer, *own])[-1]
    assert high.difference == pytest.approx((0.91 + 0.92 + 0.94) / 3 - 0.5), "its own comes first"


def test_a_run_that_is_there_twice_counts_once() -> None:
    again = [replace(r, seconds={"train": 99.0}) for r in CELLS]
    assert compare(CELLS + again) == compare(CELLS)
    nan = [replace(r, trained_accuracy=math.nan) for r in CELLS]
    same = [replace(r, trained_accuracy=float("nan")) for r in CELLS]
    assert compare(nan + same) == compare(CELLS)


def test_an_accuracy_that_is_nan_counts_for_no_seed() -> None:
    lost = [replace(r, finetuned_accuracy=math.nan) if r.seed == 1 else r for r in CELLS]
    rows = compare(lost)
    assert [row.n for row in rows] == [2, 2, 2]
    assert rows[0].difference == pytest.approx((0.80 - 0.90 + 0.81 - 0.92) / 2)
    none = [replace(r, finetuned_accuracy=math.nan) if r.mode == "low" else r for r in CELLS]
    low, high, _ = compare(none)
    assert low.n == 0
    assert math.isnan(low.difference)
    assert math.isnan(low.p_holm)
    two = [r for r in CELLS if r.mode != "low"]
    assert high.p_holm == compare(two)[0].p_holm, "no test does not count"


def test_rows_make_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(compare(CELLS))
    assert list(frame.columns) == list(Comparison.__dataclass_fields__)
    assert frame.loc[frame["mode"] == "high", "n"].item() == 3
    assert asdict(compare(CELLS)[0])["against"] == "baseline"


def test_without_scipy_the_error_has_the_line_for_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(ImportError, match=r'pip install "drophot\[stats\]"'):
        paired([0.1, 0.2], [0.2, 0.4])


# --- stability ------------------------------------------------------------------------------------


def kuncheva(coresets: list[list[int]], total: int) -> float:
    """The mean over pairs of Kuncheva's index (2007), which coresets of one size must have."""
    size = len(coresets[0])
    chance = size**2 / total
    pairs = [
        (len(set(a) & set(b)) - chance) / (size - chance)
        for number, a in enumerate(coresets)
        for b in coresets[number + 1 :]
    ]
    return statistics.fmean(pairs)


@given(st.integers(2, 12), st.integers(2, 5), st.data())
def test_stability_of_equal_sizes_is_the_mean_over_pairs(
    total: int, number: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, total - 1))
    one = st.permutations(range(total)).map(lambda order: order[:size])
    coresets = data.draw(st.lists(one, min_size=number, max_size=number))
    found = stability(coresets, total)
    assert found.n == number
    assert found.index == pytest.approx(kuncheva(coresets, total), abs=1e-12)
    assert found.interval[0] <= found.index <= found.interval[1]
    again = stability([torch.tensor(coreset) for coreset in reversed(coresets)], total)
    assert again.index == pytest.approx(found.index)
    assert again.interval == pytest.approx(found.interval)


def test_equal_coresets_are_stable_and_random_ones_are_not() -> None:
    same = stability([[0, 3, 4]] * 4, 20)
    assert (same.index, *same.interval) == pytest.approx((1, 1, 1))
    chance = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        draws = [chance.permutation(200)[:40] for _ in range(10)]
        found = stability(draws, 200)
        assert abs(found.index) < 0.1
        covered += found.interval[0] <= 0 <= found.interval[1]
    assert covered >= 180, "of about 190"


def test_coresets_of_different_sizes_may_be_compared() -> None:
    """By the definition, sample by sample: the variance over that of random selections."""
    coresets, total = [[0, 1], [0, 1, 2], [1, 2, 3, 4]], 6
    chosen = np.array([[sample in coreset for sample in range(total)] for coreset in coresets])
    share = chosen.mean()
    wanted = 1 - chosen.var(axis=0, ddof=1).mean() / (share * (1 - share))
    assert stability(coresets, total).index == pytest.approx(wanted)


def test_the_interval_is_that_of_the_jackknife_if_sizes_differ() -> None:
    chance = np.random.default_rng(0)
    liked = np.linspace(0, 2, 80)  # some samples are selected more often than others
    shares = chance.choice([0.02, 0.4], 60)
    draws = [np.flatnonzero(chance.uniform(size=80) < share * liked) for share in shares]
    without = [stability(draws[:n] + draws[n + 1 :], 80).index for n in range(60)]
    deviation = math.sqrt(59 * np.var(without))
    low, high = stability(draws, 80).interval
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.15)


@pytest.mark.parametrize(
    ("coresets", "words"),
    [
        ([[0, 1]], "`coresets`.*at least two.*1"),
        ([[0, 1], [0, 6]], "`coresets`.*6"),
        ([[0, 1], [1, 1]], "`coresets`.*1 repeated"),
        ([range(5), range(5)], "`coresets`.*5 of 5"),
        ([[], []], "`coresets`.*0 of 5"),
    ],
)
def test_coresets_that_cannot_be_compared_are_refused(coresets: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stability(coresets, 5)
    with pytest.raises(TypeError, match="`coresets`.*float"):
        stability([[0.5], [0]], 5)


# --- forgotten by pruning -------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=40),
    st.integers(1, 6),
)
def test_forgotten_samples_are_counted_by_score(
    rows: list[tuple[bool, bool, int]], groups: int
) -> None:
    before, after, scores = (torch.tensor(column) for column in zip(*rows, strict=True))
    if not before.any():
        with pytest.raises(ValueError, match="`before`"):
            forgotten_by_pruning(before, after, scores, groups)
        return
    found = forgotten_by_pruning(before, after, scores, groups)
    lost = [number for number, (first, later, _) in enumerate(rows) if first and not later]
    assert found.indices.tolist() == lost
    assert found.gained.tolist() == [n for n, (first, later, _) in enumerate(rows) if later > first]
    assert found.num_correct.sum() == before.sum()
    assert found.num_forgotten.sum() == len(lost) == round(found.share * int(before.sum()))
    assert 1 <= len(found.scores) <= groups
    assert (np.diff(found.scores) > 0).all()
    assert found.scores @ found.num_correct == pytest.approx(float(scores[before].sum()))
    for k, n, (low, high) in zip(
        found.num_forgotten, found.num_correct, found.intervals, strict=True
    ):
        assert 0 <= low <= k / n + 1e-12
        assert k / n - 1e-12 <= high <= 1


def test_groups_have_about_equal_sizes_and_equal_scores_stay_together() -> None:
    before, after = np.ones(100, dtype=bool), np.arange(100) < 90
    found = forgotten_by_pruning(before, after, np.arange(100))
    assert found.num_correct.tolist() == [10] * 10
    assert found.num_forgotten.tolist() == [0] * 9 + [10]
    assert found.intervals[0] == pytest.approx((0, 0.2775), abs=1e-4)  # Wilson's for 0 of 10
    together = forgotten_by_pruning(before, after, np.arange(100) >= 70)
    assert together.num_correct.tolist() == [70, 30]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"before": [1, 0, 1]}, TypeError, "`before`.*int"),
        ({"after": [True, True]}, ValueError, r"`after`.* 3 .*\(2,\)"),
        ({"scores": [1.0, math.nan, 2.0]}, ValueError, "`scores`.*nan.* 1"),
        ({"groups": 0}, ValueError, "`groups`.* 0"),
    ],
)
def test_wrong_samples_before_and_after_are_refused(changes: Any, error: Any, words: str) -> None:
    right = {"before": [True] * 3, "after": [True] * 3, "scores": [1.0, 2.0, 3.0]}
    with pytest.raises(error, match=words):
        forgotten_by_pruning(**right | changes)


@pytest.mark.parametrize(("seeds", "share"), [(3, 0.65), (5, 0.85), (10, 0.95)])
def test_the_interval_of_a_stability_is_too_narrow_for_few_coresets(
    seeds: int, share: float
) -> None:
    """The shares that its docstring gives: how often it holds 0, the index of random coresets."""
    chance, runs = np.random.default_rng(0), 400
    held = 0
    for _ in range(runs):
        coresets = [chance.choice(200, 40, replace=False) for _ in range(seeds)]
        low, high = stability(coresets, 200).interval
        held += low <= 0 <= high
    assert held / runs == pytest.approx(share, abs=0.05)
