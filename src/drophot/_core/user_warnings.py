"""Warnings that point at the line of the user's own that led to them."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

# Where a call passes through on its way from the user's code.
_INSIDE = (
    str(Path(__file__).parents[1]),
    str(Path(torch.__file__).parent),
    contextlib.__file__,
)


def warn(message: str) -> None:
    """A `UserWarning` that names the caller's line, however deep in the library this is.

    Args:
        message: What to say.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
