from math import floor

import numpy as np
import pytest
from helpers import references
from hypothesis import given
from hypothesis import strategies as st

from drophot._core import ratios
from drophot._core.ratios import dealt, drawn, every, fresh, hashed, members, shares


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 99))
def test_shares_are_those_of_largest_remainders(counts: list[int], ratio: float, seed: int) -> None:
    size = floor(ratio * sum(counts))
    found = shares(counts, size, seed).tolist()
    assert found == references.largest_remainders(counts, size, seed)
    assert sum(found) == size
    assert all(share <= count for share, count in zip(found, counts, strict=True))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_members_are_each_class_in_order(classes: list[int]) -> None:
    found = [part.tolist() for part in members(np.array(classes))]
    assert found == [
        [i for i, c in enumerate(classes) if c == wanted] for wanted in sorted(set(classes))
    ]


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 2**40), st.booleans(), st.data())
def test_drawn_takes_the_smallest_hashes_or_the_largest(
    total: int, ratio: float, seed: int, last: bool, data: st.DataObject
) -> None:
    """However the positions are cut into parts."""
    size = floor(ratio * total)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    positions = np.random.default_rng(0).permutation(10 * total)[:total]
    found = drawn(
        lambda: np.split(positions, cuts), total, size, seed, stream=1, last=last
    ).tolist()
    order = sorted(positions.tolist(), key=lambda p: references.splitmix64(p, seed, 1))
    expected = order[total - size :] if last else order[:size]
    assert sorted(found) == sorted(expected)


def test_drawn_looks_again_where_the_edge_is_not_where_it_was_thought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = np.sort(drawn(every(5000), 5000, 1234, seed=5))
    passes = 0

    def counted() -> list[np.ndarray]:
        nonlocal passes
        passes += 1
        return [np.arange(5000)]

    monkeypatch.setattr(ratios, "_SPREAD", 1e-9)
    found = drawn(counted, 5000, 1234, seed=5)
    assert passes > 1, "the first guess was too narrow"
    assert np.array_equal(np.sort(found), expected)


def test_drawn_holds_only_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many parts no more than a few near the edge are kept besides those taken."""
    kept: list[int] = []
    concatenate = np.concatenate

    def counted(arrays: list[np.ndarray]) -> np.ndarray:
        kept.append(sum(map(len, arrays)))
        return concatenate(arrays)

    monkeypatch.setattr(ratios.np, "concatenate", counted)
    monkeypatch.setattr(ratios, "BLOCK", 1000)
    drawn(every(1_000_000), 1_000_000, 1000, seed=0)
    assert max(kept) < 3000


def test_every_gives_all_positions_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "BLOCK", 7)
    blocks = list(every(20)())
    assert [len(block) for block in blocks] == [7, 7, 6]
    assert np.concatenate(blocks).tolist() == list(range(20))


def test_a_fresh_seed_differs_and_stays() -> None:
    found = [fresh(3, number) for number in range(1000)]
    assert len(set(found)) == 1000
    assert found[:2] == [fresh(3, 0), fresh(3, 1)]
    assert all(0 <= seed < 2**63 for seed in found)
    assert found[1] == references.splitmix64(1, 3, 3) >> 1


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**70), 2**70), st.integers(0, 5))
def test_the_hash_is_splitmix64(value: int, seed: int, stream: int) -> None:
    found = hashed(np.array([value]), seed, stream)[0]
    assert int(found) == references.splitmix64(value, seed, stream)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 99))
def test_dealt_shares_are_due_ones_rounded_up_or_down(
    counts: list[int], ratio: float, seed: int
) -> None:
    size = floor(ratio * sum(counts))
    found = dealt(counts, size, np.random.default_rng(seed)).tolist()
    assert sum(found) == size
    for share, count in zip(found, counts, strict=True):
        assert abs(share - count * size / sum(counts)) < 1
        assert 0 <= share <= count


def test_over_many_draws_each_group_is_dealt_its_proportion() -> None:
    counts, chance = [70, 5, 5, 20, 1], np.random.default_rng(0)
    mean = sum(dealt(counts, 7, chance) for _ in range(4000)) / 4000
    assert mean == pytest.approx(7 * np.array(counts) / 101, abs=0.03)
