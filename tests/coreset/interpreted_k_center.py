"""Run by `test_k_center_kernel` in a process in which Triton interprets its kernels."""

import numpy as np
import torch

from drophot.coreset import k_center_kernel


def main() -> None:
    draws = np.random.default_rng(0)
    for number in range(6):
        total, width = int(draws.integers(1, 70)), int(draws.integers(1, 9))
        k_center_kernel._MAX_PROGRAMS = int(draws.choice([1, 2, 3]))
        k_center_kernel._ROWS = 16
        k_center_kernel._COLUMNS = 4
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


if __name__ == "__main__":
    main()
