"""The Triton kernels of facility location."""

from pathlib import Path

import pytest
import torch
from helpers.interpreter import check_by_the_interpreter, needs_triton

from drophot import facility_location


@needs_triton
def test_by_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).with_name("interpreted_facility_location.py")
    check_by_the_interpreter(script, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("by_class", [False, True])
def test_on_a_gpu(by_class: bool) -> None:
    pytest.importorskip("triton")
    draws = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 40, generator=draws, dtype=torch.float64)
    targets = torch.arange(3000) % 3 if by_class else None
    expected = facility_location(points, 0.1, targets=targets)
    found = facility_location(
        points.cuda(), 0.1, targets=None if targets is None else targets.cuda()
    )
    assert torch.equal(found.ranking, expected.ranking)
    assert torch.allclose(found.gains, expected.gains)
    assert torch.equal(found.weights, expected.weights)
