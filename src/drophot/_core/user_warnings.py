"""Warnings that point to the line of the user's code."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

# Files between the user's code and the warning.
_INSIDE = (
    str(Path(__file__).parents[1]),
    str(Path(torch.__file__).parent),
    contextlib.__file__,
)


def warn(message: str) -> None:
    """Issue a `UserWarning` for the first frame outside of the library and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
