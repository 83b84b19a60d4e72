"""NVIDIA's multi-process service (MPS), by which processes compute on one GPU at the same time.

https://docs.nvidia.com/deploy/mps
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_CONTROL = "nvidia-cuda-mps-control"

FOLDER = "CUDA_MPS_PIPE_DIRECTORY"
"""The environment variable that tells processes where to find the service."""


def is_running(folder: Path | None = None) -> bool:
    """Whether the service answers in a folder; `None` is the folder that processes use now."""
    asked = _control(folder, text="get_server_list\n")
    # The control program of some releases ends with 0 without a service.
    return asked is not None and asked.returncode == 0 and "Cannot find" not in asked.stdout


def start(folder: Path) -> str | None:
    """Start the service in a folder.

    Returns:
        Why it could not be started; `None` if it runs.
    """
    started = _control(folder, "-d")
    if started is None:
        return f"{_CONTROL}, which is part of NVIDIA's driver, was not found"
    if started.returncode or not is_running(folder):
        said = started.stdout.strip().partition("\n")[0]
        return f"{_CONTROL} -d failed" + f": {said}" * bool(said)
    return None


def stop(folder: Path) -> None:
    """End the service of a folder as soon as its last client ends."""
    _control(folder, text="quit\n")


def _control(
    folder: Path | None, *arguments: str, text: str | None = None
) -> subprocess.CompletedProcess[str] | None:
    """Call the control program, with its output and its errors in `stdout`."""
    if (program := shutil.which(_CONTROL)) is None:
        return None
    environment = dict(os.environ)
    if folder is not None:
        environment |= {FOLDER: str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    try:
        return subprocess.run(
            [program, *arguments],
            input=text or "",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
