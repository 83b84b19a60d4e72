"""The global random generators of Python, NumPy and torch, saved and restored."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, cast

import numpy as np
import torch

logger = logging.getLogger("drophot")

_SILENT_WAIT = 5.0  # seconds before a warning
_lock = RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Exclude other threads of this process from the global generators while drophot draws.

    The generators belong to the process, so two threads that train at the same time would draw from
    each other's sequences. The second thread waits for the first; a warning is logged if that takes
    long. The lock is reentrant.
    """
    lock = _lock
    if not lock.acquire(timeout=_SILENT_WAIT):
        logger.warning(
            "waiting for another thread that trains or evaluates: the random generators belong to "
            "the process, so results are reproducible only if one thread at a time draws from "
            "them. To train several models in parallel, use processes"
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _replace_lock() -> None:
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):
    # In a forked child, the thread that holds the lock does not exist.
    os.register_at_fork(after_in_child=_replace_lock)


def state(device: torch.device | None = None) -> tuple[Any, ...]:
    """The states of all global generators and that of `device`, comparable with `==`."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))  # noqa: NPY002 - transforms use it
    return (
        random.getstate(),
        (name, keys.tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
        _get(device).numpy().tobytes() if _has_generator(device) else None,
    )


@contextmanager
def preserved_rng(device: torch.device | None = None, *, seed: int | None = None) -> Iterator[None]:
    """Restore the global generators and that of `device` at the end of the block.

    Other threads wait; see `exclusive`. `seed` seeds the generators at the beginning of the block
    and makes cuDNN deterministic inside it.
    """
    with exclusive():
        before = state(device)
        deterministic = torch.backends.cudnn.deterministic
        try:
            if seed is not None:
                torch.backends.cudnn.deterministic = True
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                torch.default_generator.manual_seed(
                    seed
                )  # not torch.manual_seed, which seeds all GPUs
                _seed(device, seed)
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic
            _restore(before, device)


class RandomStream:
    """Random numbers for code that must not change the sequence that the rest of a program sees.

    The stream is a copy of the global generators that is made when code first draws from it, and
    every `with stream.on(device):` continues it. The global generators stay as they are. Threads
    are not excluded, since code within training must not wait for another training.
    """

    def __init__(self) -> None:
        self._state: tuple[Any, ...] | None = None

    def reset(self) -> None:
        """Begin again with a copy of the global generators."""
        self._state = None

    def dump(self) -> dict[str, Any] | None:
        """Where the stream is, in tensors, numbers and lists; `None` if nothing was drawn yet."""
        if self._state is None:
            return None
        (version, words, gauss), (name, keys, *rest), cpu, own = self._state
        return {
            "python": [version, list(words), gauss],
            "numpy": [name, _tensor(keys), *rest],
            "cpu": _tensor(cpu),
            "device": None if own is None else _tensor(own),
        }

    def load(self, saved: dict[str, Any] | None) -> None:
        """Continue from the result of `dump`."""
        if saved is None:
            self._state = None
            return
        (version, words, gauss), (name, keys, *rest) = saved["python"], saved["numpy"]
        own = saved["device"]
        self._state = (
            (version, tuple(words), gauss),
            (name, _bytes(keys), *rest),
            _bytes(saved["cpu"]),
            None if own is None else _bytes(own),
        )

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Use this stream in place of the global generators and that of `device`."""
        if torch.compiler.is_compiling() or _is_captured(device):
            yield  # the states cannot be read, and Python code runs only once
            return
        outside = state(device)
        if self._state is not None:
            _restore(self._state, device)
        try:
            yield
        finally:
            inside = state(device)
            if self._state is not None or inside != outside:
                self._state = inside
                _restore(outside, device)


def _restore(states: tuple[Any, ...], device: torch.device | None) -> None:
    python, (name, keys, *rest), cpu, own = states
    random.setstate(python)
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_tensor(cpu))
    if own is not None and _has_generator(device):
        _set(device, _tensor(own))


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _has_generator(device: torch.device | None) -> bool:
    return device is not None and device.type in ("cuda", "xpu", "mps")


def _module(device: Any) -> Any:
    return getattr(torch, device.type)


def _arguments(device: Any) -> tuple[Any, ...]:
    return () if device.type == "mps" else (device,)  # there is only one MPS device


def _get(device: Any) -> torch.Tensor:
    return _module(device).get_rng_state(*_arguments(device))


def _set(device: Any, state: torch.Tensor) -> None:
    _module(device).set_rng_state(state, *_arguments(device))


def _seed(device: torch.device | None, seed: int) -> None:
    if not _has_generator(device):
        return
    if device.type == "mps":  # type: ignore[union-attr]
        torch.mps.manual_seed(seed)
        return
    with _module(device).device(device):
        _module(device).manual_seed(seed)


def _bytes(content: torch.Tensor) -> bytes:
    return content.cpu().numpy().tobytes()


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
