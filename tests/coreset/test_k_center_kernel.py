"""The Triton kernel of k-center, against its definition."""

import pytest
import torch

from drophot import k_center
from drophot.coreset import greedy_k_center


@pytest.mark.gpu
@pytest.mark.parametrize("start", [None, [3, 50]])
def test_on_a_gpu(start: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    points = torch.randint(-9, 10, (5000, 70), generator=torch.Generator().manual_seed(0)).float()
    expected = k_center(points, 0.1, start=start)
    found = k_center(points.cuda(), 0.1, start=start)
    assert torch.equal(found.ranking, expected.ranking)
    assert torch.equal(found.gains, expected.gains)
    monkeypatch.setattr(greedy_k_center, "has_kernels", lambda _: False)
    assert torch.equal(k_center(points.cuda(), 0.1, start=start).ranking, expected.ranking)
