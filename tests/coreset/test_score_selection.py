from typing import Any

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drophot import select
from drophot._core.ratios import num_kept

MODES = ["high", "low", "random"]
PINNED = {"high": [1, 5, 7, 9], "low": [0, 4, 6, 8], "random": [1, 4, 7, 8]}
modes = st.sampled_from(MODES)
ratios = st.floats(0, 1, exclude_min=True)
seeds = st.integers(-(2**70), 2**70)
# Few values, so that ties are the rule; and all floats, so that every order is met.
tied = st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=40)
scattered = st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40)
any_scores = st.one_of(tied, scattered)


def as_set(indices: Tensor) -> set[int]:
    return set(indices.tolist())


@given(any_scores, ratios, modes, st.integers(0, 2**64 - 1))
def test_select_equals_a_plain_sort(
    scores: list[float], ratio: float, mode: Any, seed: int
) -> None:
    indices = select(torch.tensor(scores), ratio, mode, seed=seed)
    expected = references.select(scores, num_kept(len(scores), ratio), mode, seed)
    assert indices.tolist() == expected


@given(any_scores, ratios, modes, seeds)
def test_indices_are_exact_ascending_unique_int64_on_the_cpu(
    scores: list[float], ratio: float, mode: Any, seed: int
) -> None:
    indices = select(scores, ratio, mode, seed=seed)
    assert indices.dtype == torch.int64
    assert indices.device.type == "cpu"
    assert len(indices) == max(1, int(ratio * len(scores) + 0.5))
    assert (indices.diff() > 0).all()
    assert indices[0] >= 0
    assert indices[-1] < len(scores)


@given(any_scores, ratios, ratios, modes, seeds)
def test_a_smaller_ratio_is_part_of_a_larger(
    scores: list[float], one: float, other: float, mode: Any, seed: int
) -> None:
    small, large = sorted((one, other))
    inner = select(scores, small, mode, seed=seed)
    assert as_set(inner) <= as_set(select(scores, large, mode, seed=seed))


@given(st.integers(1, 40), st.data(), seeds)
def test_high_and_low_share_one_order(size: int, data: Any, seed: int) -> None:
    """Whatever the ties, the K highest and the N - K lowest are everything, and do not overlap."""
    scores = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    count = data.draw(st.integers(1, size)) if size > 1 else 1
    if count == size:
        return
    high = select(scores, count / size, "high", seed=seed)
    low = select(scores, (size - count) / size, "low", seed=seed)
    assert as_set(high) | as_set(low) == set(range(size))
    assert not as_set(high) & as_set(low)


@given(any_scores, ratios, st.sampled_from(["high", "low"]), seeds)
def test_nothing_left_out_is_better_than_anything_kept(
    scores: list[float], ratio: float, mode: Any, seed: int
) -> None:
    values = np.array(scores, dtype=np.float32)
    indices = select(scores, ratio, mode, seed=seed).numpy()
    out = np.setdiff1d(np.arange(len(values)), indices)
    if len(out):
        if mode == "high":
            assert values[indices].min() >= values[out].max()
        else:
            assert values[indices].max() <= values[out].min()


@pytest.mark.parametrize("mode", MODES)
def test_ties_are_unbiased_by_position(mode: Any) -> None:
    """Over seeds, each of 50 equal samples is kept equally often, and each pair too."""
    rounds, size, ratio = 600, 50, 0.3
    together = np.zeros((size, size))
    for seed in range(rounds):
        chosen = np.zeros(size)
        chosen[select(np.zeros(size), ratio, mode, seed=seed).numpy()] = 1
        together += np.outer(chosen, chosen)
    expected = rounds * ratio
    spread = np.sqrt(rounds * ratio * (1 - ratio))
    assert np.abs(together.diagonal() - expected).max() < 4.5 * spread
    pair = 15 * 14 / (50 * 49)
    off = together[~np.eye(size, dtype=bool)]
    assert np.abs(off - rounds * pair).max() < 5.5 * np.sqrt(rounds * pair * (1 - pair))


def test_the_random_control_has_nothing_to_do_with_how_ties_fall() -> None:
    overlaps = [
        len(
            as_set(select(np.zeros(1000), 0.5, "random", seed=seed))
            & as_set(select(np.zeros(1000), 0.5, mode, seed=seed))
        )
        for seed in range(40)
        for mode in ("high", "low")
    ]
    assert 245 < np.mean(overlaps) < 255


def test_the_same_in_every_version() -> None:
    """Pinned: a coreset that somebody published must be found again."""
    scores = [0, 3, 1, 0, 0, 2, 0, 1, 0, 3]
    assert select(scores, 0.4, "high").tolist() == PINNED["high"]
    assert select(scores, 0.4, "low").tolist() == PINNED["low"]
    assert select(scores, 0.4, "random").tolist() == PINNED["random"]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
    ],
)
def test_any_dtype_gives_the_same(dtype: torch.dtype) -> None:
    scores = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0))
    expected = select(scores.float(), 0.37)
    assert torch.equal(select(scores.to(dtype), 0.37), expected)
    assert torch.equal(select(scores.tolist(), 0.37), expected)
    assert torch.equal(select(scores.numpy(), 0.37), expected)
    assert torch.equal(select(scores.float().requires_grad_(), 0.37), expected)
    assert torch.equal(select(torch.stack([scores, scores], 1)[:, 0], 0.37), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.int8, np.float16])
def test_arrays_of_any_kind_and_layout_give_the_same(dtype: Any) -> None:
    scores = np.random.default_rng(0).integers(0, 9, 200)
    expected = select(scores, 0.37)
    array = scores.astype(dtype)
    fixed = array.copy()
    fixed.flags.writeable = False
    for other in (array, fixed, array[::-1].copy()[::-1], np.stack([array, array], 1)[:, 0]):
        assert torch.equal(select(other, 0.37), expected)


def test_bools_and_infinities_have_an_order() -> None:
    assert select(torch.tensor([True, False, True]), 2 / 3).tolist() == [0, 2]
    infinity = float("inf")
    assert select([1.0, infinity, -infinity], 1 / 3).tolist() == [1]
    assert select([1.0, infinity, -infinity], 1 / 3, "low").tolist() == [2]
    big = 2**53
    assert select(torch.tensor([big, big + 1, big]), 1 / 3).tolist() == [1], "no detour by floats"


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=60),
    ratios,
    modes,
    st.integers(0, 2**32),
)
def test_with_targets_each_class_keeps_its_share(
    samples: list[tuple[int, int]], ratio: float, mode: Any, seed: int
) -> None:
    scores, targets = [s for s, _ in samples], [t for _, t in samples]
    indices = select(scores, ratio, mode, targets=targets, seed=seed).tolist()
    size = num_kept(len(samples), ratio)
    classes = sorted(set(targets))
    counts = [targets.count(c) for c in classes]
    shares = references.largest_remainders(counts, size, seed)
    expected = []
    for c, share in zip(classes, shares, strict=True):
        members = [i for i, t in enumerate(targets) if t == c]
        if share:
            expected += references.select(scores, share, mode, seed, members)
    assert indices == sorted(expected)
    assert len(indices) == size
    for c, count in zip(classes, counts, strict=True):
        assert abs(sum(targets[i] == c for i in indices) - count * size / len(samples)) < 1


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [(100, 0.29, 29), (3, 0.5, 2), (5, 0.5, 3), (3, 1e-9, 1), (7, 1, 7), (60_000, 0.1, 6_000)],
)
def test_one_rounding_rule(size: int, ratio: float, expected: int) -> None:
    assert len(select(np.arange(size), ratio)) == expected


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, 10, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_named(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"`ratio` .*\(0, 1\].* {ratio}\."):
        select([1.0], ratio)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], None), TypeError, "`ratio` .*NoneType"),
        (([1.0], "0.5x"), TypeError, "str"),
        (([1.0], 0.5, "hard"), ValueError, "`mode` .*'hard'"),
        (([1.0], 0.5, ["high"]), ValueError, "`mode`"),
        (([], 0.5), ValueError, r"`scores`.* \(0,\)"),
        (([[1.0]], 0.5), ValueError, r"`scores`.*\(1, 1\)"),
        (
            ([1.0, float("nan"), float("nan")], 0.5),
            ValueError,
            "`scores`.* 2 of 3.* 1",
        ),
        ((torch.tensor([1j]), 0.5), TypeError, "complex64"),
    ],
)
def test_wrong_input_is_named(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        select(*arguments)


def test_wrong_targets_and_seeds_are_named() -> None:
    with pytest.raises(ValueError, match=r"`targets`.*\(2,\).*\(3,\)"):
        select([1.0, 2.0], 0.5, targets=[0, 1, 1])
    with pytest.raises(TypeError, match="`targets` .*float64"):
        select([1.0, 2.0], 0.5, targets=[0.0, 1.0])
    with pytest.raises(TypeError):
        select([1.0, 2.0], 0.5, seed=0.5)  # type: ignore[arg-type]


def test_inputs_are_left_as_they_were() -> None:
    scores, targets = torch.tensor([3, 1, 2]), np.array([1, 0, 1])
    select(scores, 0.5, targets=targets)
    assert scores.tolist() == [3, 1, 2]
    assert targets.tolist() == [1, 0, 1]
