"""Write the results of a benchmark with the device, the versions and the command line."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

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
