from math import floor

import numpy as np
import pytest
from helpers import references
from hypothesis import given
from hypothesis import strategies as st

from drophot._core.seeded_draw import derive_seed, draw, position_blocks, splitmix64


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 2**40), st.booleans(), st.data())
def test_a_draw_takes_the_smallest_hashes_or_the_largest(
    total: int, ratio: float, seed: int, largest: bool, data: st.DataObject
) -> None:
    """However the positions are divided into blocks."""
    size = floor(ratio * total)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    positions = np.random.default_rng(0).permutation(10 * total)[:total]
    found = draw(
        lambda: np.split(positions, cuts), total, size, seed, stream=1, largest=largest
    ).tolist()
    order = sorted(positions.tolist(), key=lambda p: references.splitmix64(p, seed, 1))
    expected = order[total - size :] if largest else order[:size]
    assert sorted(found) == sorted(expected)


def test_a_draw_makes_another_pass_if_its_first_guess_is_too_narrow() -> None:
    expected = np.sort(draw(position_blocks(5000), 5000, 1234, seed=5))
    passes = 0

    def counted() -> list[np.ndarray]:
        nonlocal passes
        passes += 1
        return [np.arange(5000)]

    found = draw(counted, 5000, 1234, seed=5, num_deviations=1e-9)
    assert passes > 1, "the first guess was wide enough"
    assert np.array_equal(np.sort(found), expected)


def test_a_draw_holds_little_more_than_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    concatenate = np.concatenate

    def counted(arrays: list[np.ndarray]) -> np.ndarray:
        held.append(sum(map(len, arrays)))
        return concatenate(arrays)

    monkeypatch.setattr(np, "concatenate", counted)
    draw(position_blocks(1_000_000, block=1000), 1_000_000, 1000, seed=0)
    assert max(held) < 3000


def test_blocks_hold_all_positions() -> None:
    blocks = list(position_blocks(20, block=7)())
    assert [len(block) for block in blocks] == [7, 7, 6]
    assert np.concatenate(blocks).tolist() == list(range(20))


def test_derived_seeds_differ_and_are_stable() -> None:
    found = [derive_seed(3, number) for number in range(1000)]
    assert len(set(found)) == 1000
    assert found[:2] == [derive_seed(3, 0), derive_seed(3, 1)]
    assert all(0 <= seed < 2**63 for seed in found)
    assert found[1] == references.splitmix64(1, 3, 3) >> 1


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**70), 2**70), st.integers(0, 5))
def test_the_hash_is_splitmix64(value: int, seed: int, stream: int) -> None:
    found = splitmix64(np.array([value]), seed, stream)[0]
    assert int(found) == references.splitmix64(value, seed, stream)
