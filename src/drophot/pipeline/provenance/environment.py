"""The versions and the device that a result can depend on."""

from __future__ import annotations

import platform

import numpy as np
import torch


def versions() -> dict[str, str]:
    """The versions of drophot, torch, NumPy and Python."""
    from drophot import __version__  # here, since the package is still loading at the top

    return {
        "drophot": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """A device's type, and a GPU's product name."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
