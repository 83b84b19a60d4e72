"""Density-weighted facility location, against its definition written as loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drophot._core.ratios import num_kept
from drophot.coreset import density_facility_location


def neighbors(total: int, size: int, coverage: float) -> int:
    """Moser et al.: how many neighbors have one of `size` random samples among them."""
    for k in range(1, total - size + 1):
        missed = np.prod([(total - size - m) / (total - m) for m in range(1, k + 1)])
        if 1 - missed >= coverage:
            return k
    return 0  # all samples are kept


def assert_greedy(rows: np.ndarray, ranking: list[int], coverage: float) -> None:
    """Each medoid is the best one after the earlier ones, of which several may be equally good."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = unit @ unit.T
    total, weights = len(rows), np.ones(len(rows))
    if k := neighbors(total, len(ranking), coverage):
        away = np.array([sorted(np.delete(1 - similar[i], i))[k - 1] for i in range(total)])
        weights = np.exp(-((away - np.mean(away)) ** 2) / (2 * np.var(away)))
    assert len(set(ranking)) == len(ranking)
    for step, medoid in enumerate(ranking):
        earlier = ranking[:step]
        value = {
            j: sum(max(weights[m] * similar[i, m] for m in [*earlier, j]) for i in range(total))
            for j in set(range(total)) - set(earlier)
        }
        assert value[medoid] == pytest.approx(max(value.values()), abs=1e-9)


@settings(max_examples=30)
@given(st.integers(3, 14), st.floats(0.05, 1), st.floats(0.05, 0.95), st.integers(0, 999))
def test_it_is_the_greedy_algorithm_of_the_paper(
    total: int, ratio: float, coverage: float, seed: int
) -> None:
    rows = np.random.default_rng(seed).normal(size=(total, 4))
    found = density_facility_location(torch.from_numpy(rows), ratio, coverage=coverage)
    assert len(found.ranking) == num_kept(total, ratio)
    assert_greedy(rows, found.ranking.tolist(), coverage)
    assert found.weights is not None
    assert found.weights.sum() == total
    assert (found.gains[1:] <= found.gains[:-1] + 1e-6).all()


def test_classes_are_covered_separately_and_start_samples_count() -> None:
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(60) % 3
    found = density_facility_location(rows, 0.2, targets=targets)
    assert targets[found.indices].bincount().tolist() == [4, 4, 4]
    part = density_facility_location(rows[targets == 1], 0.2)
    assert torch.equal((targets == 1).nonzero()[:, 0][part.ranking], found.ranking[4:8])
    again = density_facility_location(rows, 0.2, start=torch.tensor([7, 9]))
    assert len(again.indices) == 12
    assert {7, 9} <= set(again.indices.tolist())
    assert not {7, 9} & set(again.ranking.tolist())


def test_the_length_of_a_row_does_not_matter() -> None:
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    longer = rows * torch.linspace(0.1, 9, 40, dtype=torch.float64)[:, None]
    one, other = (density_facility_location(part, 0.3) for part in (rows, longer))
    assert torch.equal(one.ranking, other.ranking)
    assert density_facility_location(torch.ones(5, 2), 0.4).ranking.shape == (2,)


def test_wrong_arguments_are_named() -> None:
    for coverage in (0, 1, 60):
        with pytest.raises(ValueError, match=f"`coverage`.* {coverage}"):
            density_facility_location(torch.rand(4, 2), 0.5, coverage=coverage)
    with pytest.raises(ValueError, match=r"`features`.*\(3,\)"):
        density_facility_location(torch.rand(3), 0.5)


@pytest.mark.parametrize("scale", [1e30, 1e25, 1e-30])
def test_the_scale_of_the_features_changes_nothing(scale: float) -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    found = density_facility_location(rows * scale, 0.2)
    assert found.ranking.tolist() == density_facility_location(rows, 0.2).ranking.tolist()
