"""Checks of what a score does and returns, each time that it is called."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from drophot.tracking.state import to_device
from drophot.tracking.validation import describe


@contextmanager
def unchanged(name: str, **tensors: Tensor) -> Generator[None]:
    """Refuse a score that changes its arguments, which the training and other scores use too."""
    if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors.values()):
        yield  # there are no versions
        return
    before = {argument: tensor._version for argument, tensor in tensors.items()}
    yield
    for argument, tensor in tensors.items():
        if tensor._version != before[argument]:
            raise ValueError(
                f"Score {name!r} must not change its arguments, but it changed `{argument}` in "
                f"place. Work on a copy: `{argument} = {argument}.clone()`."
            )


def checked(name: str, values: Tensor, logits: Tensor) -> Tensor:
    """A score's values as float32 on the device of the logits, if there is one for each row."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(
            f"Score {name!r} must return a float tensor, got {describe(values)}. Convert it "
            f"with `.float()`."
        )
    if values.shape != logits.shape[:1]:
        raise ValueError(
            f"Score {name!r} must return one value per sample, shape ({len(logits)},), got "
            f"shape {tuple(values.shape)}. Reduce over the classes, not over the batch."
        )
    return to_device(values.detach(), logits.device, torch.float32)
