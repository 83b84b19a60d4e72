"""Facility location by its kernels, run by Triton's interpreter, against the definition.

`test_interpreted.py` runs these tests in a process of their own, because Triton
chooses its interpreter when it is imported. To run them alone:

    TRITON_INTERPRET=1 python -m pytest tests/coreset/interpreted_facility_location.py
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_greedy import check_medoids, cloud, grids

from drophot import Coreset, facility_location
from drophot._core.ratios import num_kept
from drophot.coreset import (
    device_facility_location,
    facility_location_kernel,
    greedy_facility_location,
)


def on_a_cpu(*arguments: Any, **options: Any) -> Coreset:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(greedy_facility_location, "is_possible", lambda _: False)
        return facility_location(*arguments, **options)


@given(grids(7), st.floats(0.01, 1), st.sampled_from([4, 8]), st.booleans(), st.data())
@settings(max_examples=5, deadline=None)
def test_each_medoid_lowers_the_sum_most(
    points: np.ndarray, ratio: float, block: int, double: bool, data: st.DataObject
) -> None:
    size = num_kept(len(points), ratio)
    start = data.draw(st.lists(st.integers(0, len(points) - 1), unique=True, max_size=size))
    features = torch.from_numpy(points).to(torch.float64 if double else torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facility_location_kernel, "_SAMPLES", block)
        patch.setattr(facility_location_kernel, "_CANDIDATES", block)
        patch.setattr(facility_location_kernel, "_ROWS", 4)
        patch.setattr(device_facility_location, "_ROWS", 7)
        patch.setattr(device_facility_location, "_BLOCK", 40)
        found = facility_location(features, ratio, start=start)
    check_medoids(points, start, found)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=6), st.floats(0.1, 1))
@settings(max_examples=3, deadline=None)
def test_ties_of_exact_gains_are_broken_as_on_a_cpu(numbers: list[int], ratio: float) -> None:
    points = torch.tensor(numbers, dtype=torch.float32)[:, None]
    found, expected = facility_location(points, ratio), on_a_cpu(points, ratio)
    assert found.ranking.tolist() == expected.ranking.tolist()
    assert found.gains.tolist() == expected.gains.tolist()
    assert found.weights is not None
    assert expected.weights is not None
    assert found.weights.tolist() == expected.weights.tolist()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-30), (torch.float64, 1e30)])
def test_a_cloud_by_class(dtype: torch.dtype, scale: float) -> None:
    points, targets = (cloud(24) * scale).to(dtype), torch.arange(24) % 3
    found = facility_location(points, 0.2, targets=targets)
    expected = on_a_cpu(points, 0.2, targets=targets)
    assert found.ranking.tolist() == expected.ranking.tolist()
    assert torch.allclose(found.gains, expected.gains, rtol=1e-5)


def test_there_are_two_launches_for_each_medoid(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: Counter[str] = Counter()
    for name in ("_take_best", "_lower_gains"):
        kernel = getattr(facility_location_kernel, name)

        class Counted:
            def __init__(self, kernel: Any, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: Any) -> Any:
                launches[self.name] += 1
                return self.kernel[grid]

        monkeypatch.setattr(facility_location_kernel, name, Counted(kernel, name))
    facility_location(cloud(20), 0.2)
    assert launches == {"_take_best": 4, "_lower_gains": 5}


def test_without_enough_memory_distances_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drophot._core.memory.available", lambda _: 16e8)
    assert not device_facility_location.is_possible(torch.empty(20_000, 1))
    assert device_facility_location.is_possible(torch.empty(5_000, 1))
