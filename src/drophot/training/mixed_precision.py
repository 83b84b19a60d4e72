"""The surrounding `torch.autocast`, without its cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device_type: str) -> bool:
    """Whether an autocast surrounds this call; there is none for some types of devices."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def uncached_autocast(device_type: str) -> AbstractContextManager[object]:
    """The surrounding autocast, if there is one, without its cache of weights.

    The cache lives until the outermost autocast ends. A later step would see the weights of an
    earlier one, and the autograd nodes of these weights would belong to another stream than the one
    that a CUDA graph is captured on.
    """
    if not autocasts(device_type):
        return nullcontext()
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype, cache_enabled=False)
