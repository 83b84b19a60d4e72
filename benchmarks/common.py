"""Write the results of a benchmark with the device, the versions and the command line.

`read_grid` reads the records of a grid, and `busy_core` takes a core while a benchmark runs.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from drophot import Record, records
from drophot.pipeline.provenance.environment import device_name, versions

RESULTS = Path(__file__).parent / "results"


def save(name: str, device: torch.device, figures: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    written = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": versions(),
        "figures": figures,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(written, indent=2) + "\n")
    print(f"\nWritten to {path.relative_to(RESULTS.parent.parent)}")


def read_grid(name: str) -> list[Record]:
    """The records of a grid in the order of its cells, not in that in which they finished."""
    found = records.read(RESULTS / f"grid_{name}.jsonl")
    modes = ["baseline", "low", "high", "random", *(r.mode for r in found)]
    return sorted(found, key=lambda r: (modes.index(r.mode), r.keep_ratio, r.prune_ratio, r.seed))


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep core 1 busy, as the workers of a loader do."""
    work = "import os; os.sched_setaffinity(0, {1})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", work])
    try:
        yield
    finally:
        process.kill()
        process.wait()
