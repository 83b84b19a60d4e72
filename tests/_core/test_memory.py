import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drophot import k_center
from drophot._core import memory


def test_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(error.value)
    with pytest.raises(MemoryError) as python:
        _ = bytearray(2**60)
    assert memory.is_out_of_memory(python.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("Allocation on device"))
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert memory.is_out_of_memory(RuntimeError(cublas))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
        _ = torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not memory.is_out_of_memory(error.value)
    assert not memory.is_out_of_memory(ValueError("out of memory"))


def test_available_memory_is_less_than_the_machine_has() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 28 < memory.available("cpu") < total


# --- what is left in a container, in a scheduler's job, and by the process's own limits ----------

MB = 1 << 20


def machine(
    root: Path, groups: str, files: dict[str, str | int], pages: str = "1 1 0 0 0 1"
) -> Path:
    """A `/proc` and a `/sys` with 8 GB free."""
    files = {
        "proc/meminfo": f"MemTotal: {2 * 8192 * 1024} kB\nMemAvailable: {8192 * 1024} kB\n",
        "proc/self/cgroup": groups,
        "proc/self/statm": pages,
        **{f"sys/fs/cgroup/{name}": content for name, content in files.items()},
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


GROUPS: dict[str, tuple[str, dict[str, str | int], int]] = {
    "no groups": ("", {}, 8192),
    "no limit": ("0::/", {"memory.max": "max", "memory.current": 5 * MB}, 8192),
    "version 2, a container's": ("0::/", {"memory.max": 600 * MB, "memory.current": 500 * MB}, 100),
    "version 2, with a file's pages": (
        "0::/a",
        {
            "a/memory.max": 600 * MB,
            "a/memory.current": 500 * MB,
            "a/memory.stat": f"anon {200 * MB}\ninactive_file {300 * MB}\nactive_file 7",
        },
        400,
    ),
    "version 2, a limit further up": (
        "0::/slurm/job/step",
        {
            "slurm/memory.max": 700 * MB,
            "slurm/memory.current": 600 * MB,
            "slurm/job/memory.max": "max",
            "slurm/job/memory.current": 500 * MB,
            "slurm/job/step/memory.max": 900 * MB,
            "slurm/job/step/memory.current": 100 * MB,
        },
        100,
    ),
    "version 2, throttled before": (
        "0::/",
        {"memory.max": "max", "memory.high": 300 * MB, "memory.current": 100 * MB},
        200,
    ),
    "version 1": (
        "5:cpu:/x\n4:memory:/job",
        {
            "memory/job/memory.limit_in_bytes": 600 * MB,
            "memory/job/memory.usage_in_bytes": 500 * MB,
            "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {50 * MB}",
            "memory/memory.limit_in_bytes": 9223372036854771712,
            "memory/memory.usage_in_bytes": 900 * MB,
        },
        150,
    ),
    "version 1, a path of the host": (
        "4:cpu,memory:/docker/0123",
        {"memory/memory.limit_in_bytes": 600 * MB, "memory/memory.usage_in_bytes": 500 * MB},
        100,
    ),
    "more than there is": ("0::/", {"memory.max": 100 * MB, "memory.current": 101 * MB}, 0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_memory_is_what_the_control_groups_leave(name: str, tmp_path: Path) -> None:
    groups, files, left = GROUPS[name]
    assert memory.available("cpu", root=machine(tmp_path, groups, files)) == left * MB


@pytest.mark.parametrize(("limit", "place"), [("RLIMIT_AS", 0), ("RLIMIT_DATA", 5)])
def test_memory_is_what_the_process_may_have(
    limit: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 10 * MB // os.sysconf("SC_PAGE_SIZE")
    pages = " ".join(str(taken if i == place else 0) for i in range(7))
    resource = memory.resource
    limits = {getattr(resource, limit): 64 * MB}
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (limits.get(which, resource.RLIM_INFINITY),) * 2
    )
    assert memory.available("cpu", root=machine(tmp_path, "", {}, pages)) == 54 * MB


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(1000, 8, dtype=torch.float16),
        torch.zeros(1000, 8, dtype=torch.int64),
        np.zeros((1000, 8), np.float16),
    ],
    ids=lambda features: f"{type(features).__name__} of {features.dtype}",
)
def test_features_that_would_not_fit_once_converted_are_refused(
    features: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converted(*_: object) -> None:
        raise AssertionError("the features were converted before there was memory for it")

    monkeypatch.setattr("drophot._core.memory.available", lambda device: 4 * 1000 * 8 - 1)
    monkeypatch.setattr("drophot.coreset.greedy.as_real_tensor", converted)
    with pytest.raises(MemoryError, match="`features`"):
        k_center(features, 0.1)
