"""The random numbers that data and models draw: Python's, NumPy's and torch's."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("drophot")

_PATIENCE = 5.0  # seconds of silent waiting
_turn = RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Let no other thread of this process draw from the global generators through drophot.

    The generators belong to the process. Two threads that train at the same time would take each
    other's numbers, so the second one waits for the first; if that takes long, a warning says so.
    A thread can enter again what it is in already.

    Yields:
        Nothing.
    """
    turn = _turn
    if not turn.acquire(timeout=_PATIENCE):
        logger.warning(
            "waiting for another thread that trains or evaluates: random numbers belong to the "
            "process, and one seed gives one result only if one thread draws at a time. To train "
            "side by side, use processes"
        )
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


def _renew() -> None:
    global _turn
    _turn = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)  # the thread that holds it may not live on there


def state(device: torch.device | None = None) -> tuple[Any, ...]:
    """Where the global generators stand, comparable by `==`.

    Args:
        device: A device whose generator counts too.

    Returns:
        The states of Python's, NumPy's and torch's generators, and the device's.
    """
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - what transforms draw from
    return (
        random.getstate(),
        (name, tuple(keys), *rest),
        torch.get_rng_state().numpy().tobytes(),
        _get(device).numpy().tobytes() if _has_its_own(device) else None,
    )


@contextmanager
def preserved_rng(device: torch.device | None = None, *, seed: int | None = None) -> Iterator[None]:
    """Put the global generators back where they stood, whatever happens inside.

    Other threads that come here wait until this one is done: see `exclusive`.

    Args:
        device: A device whose generator is put back too.
        seed: Starts the generators from here inside, where a GPU's convolutions are deterministic.

    Yields:
        Nothing.
    """
    with exclusive():
        python, numpy, cpu, own = state(device)
        deterministic = torch.backends.cudnn.deterministic
        try:
            if seed is not None:
                torch.backends.cudnn.deterministic = True
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                torch.default_generator.manual_seed(seed)  # torch.manual_seed moves every GPU's too
                _seed(device, seed)
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            torch.set_rng_state(_tensor(cpu))
            if own is not None:
                _set(device, _tensor(own))


def _has_its_own(device: torch.device | None) -> bool:
    """Whether a device has a generator: CUDA, XPU and MPS do."""
    return device is not None and device.type in ("cuda", "xpu", "mps")


def _module(device: Any) -> Any:
    return getattr(torch, device.type)


def _arguments(device: Any) -> tuple[Any, ...]:
    return () if device.type == "mps" else (device,)  # of which there is one


def _get(device: Any) -> torch.Tensor:
    return _module(device).get_rng_state(*_arguments(device))


def _set(device: Any, state: torch.Tensor) -> None:
    _module(device).set_rng_state(state, *_arguments(device))


def _seed(device: torch.device | None, seed: int) -> None:
    if not _has_its_own(device):
        return
    if device.type == "mps":  # type: ignore[union-attr]
        torch.mps.manual_seed(seed)
        return
    with _module(device).device(device):
        _module(device).manual_seed(seed)


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
