"""`select` on a GPU. `interpreted_selection.py` tests its kernels without one."""

from typing import Any

import pytest
import torch

from drophot.coreset import Stratified, select

MODES = ["high", "low", "random", Stratified(bins=7)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("levels", [1, 9, 1 << 40])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int16]
)
def test_a_gpu_selects_the_same_samples(mode: Any, levels: int, dtype: torch.dtype) -> None:
    scores = torch.randint(levels, (300_001,)).clamp(max=30_000).to(dtype)
    targets, among = torch.randint(10, scores.shape), torch.randperm(len(scores))[:200_000]
    for options in ({}, {"targets": targets}, {"among": among, "targets": targets, "seed": 3}):
        expected = select(scores, 0.1, mode, **options)
        found = select(scores.cuda(), 0.1, mode, **options)
        assert found.device.type == "cpu"
        assert torch.equal(found, expected)
    there = select(scores.cuda(), 0.1, mode, targets=targets.cuda())
    assert torch.equal(there, select(scores, 0.1, mode, targets=targets))


@pytest.mark.gpu
def test_floats_of_all_kinds_on_a_gpu() -> None:
    scores = torch.randint(-(2**31), 2**31, (1 << 20,)).int().view(torch.float32)
    scores[scores.isnan()] = -0.0
    scores[: 1 << 18] *= 1e-38  # denormals
    for mode in ("high", "low"):
        assert torch.equal(select(scores.cuda(), 0.4, mode), select(scores, 0.4, mode))


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    scores = torch.rand(10_000_000, device="cuda")
    select(scores[:100], 0.1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select(scores, 0.1)
    assert torch.cuda.max_memory_allocated() - before < 0.4 * scores.nbytes  # indices take 0.2
