import os
from pathlib import Path

import pytest
import torch
from conftest import run
from test_step import mlp, samples
from torch import Tensor, nn

from drophot import _memory


@pytest.mark.parametrize("batch", [1, 8])
def test_what_a_step_needs_is_counted(batch: int) -> None:
    inputs, targets = samples(batch, 6).tensors
    weights = 16 * 6 + 16 + 4 * 16 + 4
    kept = batch * 6 + batch * 16  # what the layers were given
    loss = batch * 4 + 1  # log-probabilities, and the sum of the samples' weights
    by_hand = 4 * (4 * weights + kept + loss) + 8 * batch
    assert _memory.needed(mlp(), inputs, targets) == by_hand


def test_what_two_layers_keep_is_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.one(inputs) + self.two(inputs)

    inputs, targets = samples(8, 6).tensors
    by_hand = 4 * (4 * 2 * 28 + 8 * 6 + 8 * 4 + 1) + 8 * 8
    assert _memory.needed(Twice(), inputs, targets) == by_hand


def test_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert _memory.is_out_of_memory(error.value)
    with pytest.raises(MemoryError) as python:
        _ = bytearray(2**60)
    assert _memory.is_out_of_memory(python.value)
    assert _memory.is_out_of_memory(torch.OutOfMemoryError("Allocation on device"))
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert _memory.is_out_of_memory(RuntimeError(cublas))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
        _ = torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not _memory.is_out_of_memory(error.value)
    assert not _memory.is_out_of_memory(ValueError("out of memory"))


def test_available_memory_is_less_than_the_machine_has() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 28 < _memory.available("cpu") < total


def resident() -> int:
    """The process's memory, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.skipif(not _memory._GLIBC, reason="other C libraries have other ways")
def test_memory_is_held_for_the_next_step_and_given_back_at_last(tmp_path: Path) -> None:
    """In a process of its own, since glibc learns from what was asked of it before."""
    held, at_last, later = map(int, run(__file__, folder=tmp_path).split())
    assert held > 250, "all of the 256 MB"
    assert at_last < 100
    assert later < 100, "glibc does as it did"


def main() -> None:
    """What the process of the test above does."""
    before = resident()
    with _memory.held():
        tensors = [torch.ones(1 << 20) for _ in range(64)]
        del tensors
        print(resident() - before)  # noqa: T201
    print(resident() - before)  # noqa: T201
    large = torch.ones(64 << 20)
    del large
    print(resident() - before)  # noqa: T201


if __name__ == "__main__":
    main()
