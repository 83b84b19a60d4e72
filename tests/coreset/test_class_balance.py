from math import floor

import numpy as np
import pytest
from helpers import references
from hypothesis import given
from hypothesis import strategies as st

from drophot.coreset.class_balance import (
    class_members,
    proportional_sizes,
    random_proportional_sizes,
)

counts_of_classes = st.lists(st.integers(1, 50), min_size=1, max_size=12)


@given(counts_of_classes, st.floats(0, 1), st.integers(0, 99))
def test_sizes_are_those_of_largest_remainders(counts: list[int], ratio: float, seed: int) -> None:
    size = floor(ratio * sum(counts))
    found = proportional_sizes(counts, size, seed).tolist()
    assert found == references.largest_remainders(counts, size, seed)
    assert sum(found) == size
    assert all(share <= count for share, count in zip(found, counts, strict=True))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_members_of_each_class_are_in_order(classes: list[int]) -> None:
    found = [part.tolist() for part in class_members(np.array(classes))]
    assert found == [
        [i for i, c in enumerate(classes) if c == wanted] for wanted in sorted(set(classes))
    ]


@given(counts_of_classes, st.floats(0, 1), st.integers(0, 99))
def test_random_sizes_are_the_exact_shares_rounded_up_or_down(
    counts: list[int], ratio: float, seed: int
) -> None:
    size = floor(ratio * sum(counts))
    found = random_proportional_sizes(counts, size, np.random.default_rng(seed)).tolist()
    assert sum(found) == size
    for share, count in zip(found, counts, strict=True):
        assert abs(share - count * size / sum(counts)) < 1
        assert 0 <= share <= count


def test_over_many_draws_each_class_gets_its_proportion() -> None:
    counts, generator = [70, 5, 5, 20, 1], np.random.default_rng(0)
    mean = sum(random_proportional_sizes(counts, 7, generator) for _ in range(4000)) / 4000
    assert mean == pytest.approx(7 * np.array(counts) / 101, abs=0.03)
