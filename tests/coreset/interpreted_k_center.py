"""K-center by its kernel, run by Triton's interpreter, against the definition.

`test_interpreted.py` runs this test in another process, because Triton chooses its interpreter
when it is imported. To run it alone:

    TRITON_INTERPRET=1 python -m pytest tests/coreset/interpreted_k_center.py
"""

import numpy as np
import pytest
import torch

from drophot.coreset import k_center_kernel


@pytest.mark.parametrize("number", range(6))
def test_each_center_is_the_farthest_point(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(number)
    total, width = int(draws.integers(1, 70)), int(draws.integers(1, 9))
    monkeypatch.setattr(k_center_kernel, "_MAX_PROGRAMS", int(draws.choice([1, 2, 3])))
    monkeypatch.setattr(k_center_kernel, "_ROWS", 16)
    monkeypatch.setattr(k_center_kernel, "_COLUMNS", 4)
    points = draws.integers(-2, 3, (total, width))
    count = int(draws.integers(1, min(total, 6) + 1))
    dtype = (torch.float32, torch.float64)[number % 2]
    away = ((points[:, None] - points) ** 2).sum(2).astype(float)
    nearest = np.full(total, np.inf)
    expected, gains = [], []
    for _ in range(count):
        expected.append(int(nearest.argmax()))
        gains.append(nearest[expected[-1]])
        nearest = np.minimum(nearest, away[expected[-1]])
        nearest[expected] = -1
    state = torch.full((total,), torch.inf, dtype=dtype)
    rows = torch.from_numpy(points).to(dtype)
    ranking, squares = k_center_kernel.add_centers(rows, state, 0, count)
    assert ranking.tolist() == expected, (ranking.tolist(), expected)
    assert squares.tolist() == gains
    assert state.tolist() == nearest.tolist()
