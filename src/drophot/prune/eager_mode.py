"""Run a model as it is written: no compiled code, no weights that autocast kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled models as they are written: hooks and modes would make torch compile them again.

    Yields:
        Nothing.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def uncached(device: torch.device) -> torch.autocast:
    """A surrounding autocast keeps weights that it has cast, those before pruning for one.

    Args:
        device: Where the model is.

    Returns:
        A context in which it keeps none.
    """
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=enabled, cache_enabled=False)
