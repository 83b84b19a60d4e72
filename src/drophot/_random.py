"""The random numbers that data and models draw: Python's, NumPy's and torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch


def state(device: torch.device | None = None) -> tuple[Any, ...]:
    """Where the global generators stand, comparable by `==`.

    Args:
        device: A GPU whose generator counts too.

    Returns:
        The states of Python's, NumPy's and torch's generators, and the GPU's.
    """
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - what transforms draw from
    return (
        random.getstate(),
        (name, tuple(keys), *rest),
        torch.get_rng_state().numpy().tobytes(),
        torch.cuda.get_rng_state(device).numpy().tobytes() if _is_gpu(device) else None,
    )


@contextmanager
def kept(device: torch.device | None = None, *, seed: int | None = None) -> Iterator[None]:
    """Put the global generators back where they stood, whatever happens inside.

    Args:
        device: A GPU whose generator is put back too.
        seed: Starts the generators from here inside, where a GPU's convolutions are deterministic.

    Yields:
        Nothing.
    """
    python, numpy, cpu, gpu = state(device)
    deterministic = torch.backends.cudnn.deterministic
    if seed is not None:
        torch.backends.cudnn.deterministic = True
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)  # torch.manual_seed moves every GPU's on too
        if _is_gpu(device):
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = deterministic
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
        if _is_gpu(device):
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(gpu), dtype=torch.uint8), device)


def _is_gpu(device: torch.device | None) -> TypeGuard[torch.device]:
    return device is not None and device.type == "cuda"
