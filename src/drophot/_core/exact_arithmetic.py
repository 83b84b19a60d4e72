"""Arithmetic that does not depend on the modes of torch that surround a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch

_lock = Lock()
_depth = 0
_restore = ExitStack()


@contextmanager
def exact(*, products: bool = False, in_place: bool = False) -> Iterator[None]:
    """Compute in the precision of the tensors, without gradients and outside inference mode.

    Autocast is off, and new tensors are on the CPU unless a device is named. All modes are restored
    at the end. It is also a decorator: `@exact()`.

    Args:
        products: Compute products of float32 matrices in float32. torch has one setting of this for
            all threads of a process, so it is changed only where there are such products.
        in_place: Stay in inference mode, because the block changes tensors of the caller that may
            have been created in it.
    """
    with ExitStack() as modes:
        accelerator = torch.accelerator.current_accelerator()
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled() and not in_place:
            modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        if torch.empty(0).device.type != "cpu":  # by set_default_device or a surrounding context
            modes.enter_context(torch.device("cpu"))
        if products:
            modes.enter_context(_full_precision())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 in products of float32 matrices, until the last concurrent use ends."""
    global _depth, _restore
    with _lock:
        if _depth == 0:
            _restore = _set_highest()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restore.close()


def _set_highest() -> ExitStack:
    """Set the highest precision; closing the returned stack restores the user's setting."""
    restore = ExitStack()
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer of torch's two interfaces
        old = None
    # torch before 2.9 has only the older interface.
    parts = [
        (backend.matmul, backend.matmul.fp32_precision, parent.fp32_precision)
        for backend, parent in (
            (torch.backends.cuda, torch.backends),
            (torch.backends.mkldnn, torch.backends.mkldnn),
        )
        if hasattr(getattr(backend, "matmul", None), "fp32_precision")
    ]
    if old == "highest" and all(value in ("none", "ieee") for _, value, _ in parts):
        return restore
    for part, value, inherited in parts:
        restore.callback(setattr, part, "fp32_precision", "none" if value == inherited else value)
    if old not in (None, "highest"):
        restore.callback(torch.set_float32_matmul_precision, old)
    torch.set_float32_matmul_precision("highest")
    return restore
