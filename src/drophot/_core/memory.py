"""Available memory, and out-of-memory errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path, PurePosixPath

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def available(device: torch.device | str, *, root: Path = Path("/")) -> float:
    """The bytes of memory that are still available on a device; infinity if unknown.

    For a CPU, this is the minimum of what the machine, the control groups of a container or a
    scheduler's job, and the limits of the process (`ulimit`) allow. `root` contains `proc` and
    `sys`.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_of_machine(root), *_of_groups(root), *_of_process(root)]
    return max(0, min(left))


def _of_machine(root: Path) -> float:
    with suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        return 1024 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return inf


def _of_groups(root: Path) -> Iterator[float]:
    """What each control group of the process leaves, for cgroup versions 1 and 2."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if not path:
                continue
            if not controllers:
                folder, limits, used = "", ("memory.max", "memory.high"), "memory.current"
                cache = "inactive_file"
            elif "memory" in controllers.split(","):
                folder, limits = "memory", ("memory.limit_in_bytes",)
                used, cache = "memory.usage_in_bytes", "total_inactive_file"
            else:
                continue
            top = root / "sys/fs/cgroup" / folder
            inside = PurePosixPath(path.lstrip("/"))
            # Limits of the parent groups apply, too. In a container, the path may be the host's,
            # which does not exist here; then only the top group is read.
            for group in (top / inside, *(top / parent for parent in inside.parents)):
                for limit in limits:
                    with suppress(OSError, ValueError):  # "max" means no limit
                        most = int((group / limit).read_text())
                        taken = int((group / used).read_text())
                        yield most - taken + _number(group / "memory.stat", cache)


def _number(file: Path, name: str) -> int:
    """The number after `name` in a file of such lines, or 0."""
    with suppress(OSError, ValueError):
        lines = map(str.split, file.read_text().splitlines())
        return next((int(line[1]) for line in lines if line[:1] == [name]), 0)
    return 0


def _of_process(root: Path) -> Iterator[float]:
    """What the limits of this process leave of its address space and of its data."""
    if resource is None:
        return
    with suppress(OSError, ValueError, IndexError):
        pages = (root / "proc/self/statm").read_text().split()
        for limit, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY:
                yield most - int(pages[column]) * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the CPU or of a GPU was exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
