"""Run a model without compiled code and without weights that autocast has cached."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled models eagerly, since hooks and modes would make torch compile them again."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def uncached(device: torch.device) -> torch.autocast:
    """The surrounding autocast without its cache, which may hold weights from before pruning."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=enabled, cache_enabled=False)
