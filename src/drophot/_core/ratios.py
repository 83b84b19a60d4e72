"""Ratios of samples and of weights: the rounding rule and the checks."""

from __future__ import annotations

from math import floor
from typing import Any

from drophot._core import scalars


def round_half_up(value: float) -> int:
    """The nearest integer, halves up: the one rounding rule of every ratio in the library."""
    return floor(value + 0.5)


def num_kept(total: int, ratio: float) -> int:
    """How many samples a keep ratio in (0, 1] leaves of `total`: at least one.

    >>> num_kept(100, 0.29), num_kept(5, 0.5), num_kept(3, 0.01)
    (29, 3, 1)
    """
    return max(1, round_half_up(float(ratio) * total))


def num_removed(total: int, ratio: float) -> int:
    """How many of `total` elements a prune ratio in [0, 1) removes.

    >>> num_removed(100, 0.29), num_removed(5, 0.5), num_removed(3, 0.01)
    (29, 3, 0)
    """
    return round_half_up(ratio * total)


def check_keep_ratio(name: str, ratio: Any) -> float:
    """A fraction of the samples as a float, checked to be in (0, 1]."""
    found = scalars.ratio(name, ratio, "(0, 1]")
    if not 0 < found <= 1:
        percent = found if 2 <= found <= 100 else 80.0
        raise ValueError(
            f"`{name}` must be in (0, 1], got {ratio}. To keep {percent:g} %, pass "
            f"{percent / 100:g}."
        )
    return found


def check_prune_ratio(name: str, ratio: Any) -> float:
    """A fraction of the weights as a float, checked to be in [0, 1)."""
    found = scalars.ratio(name, ratio, "[0, 1)")
    if not 0 <= found < 1:
        percent = found if 2 <= found < 100 else 80.0
        raise ValueError(
            f"`{name}` must be in [0, 1), got {ratio}. For {percent:g} %, pass {percent / 100:g}."
        )
    return found
