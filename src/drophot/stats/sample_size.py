"""The number of seeds that a paired test needs."""

from __future__ import annotations

import math

from drophot._core import scalars
from drophot.stats.paired_t_power import pairs_needed
from drophot.stats.paired_tests import check_share


def seeds_needed(difference: float, std: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Compute how many seeds the paired t-test needs to detect a difference.

    Args:
        difference: The true mean difference.
        std: The standard deviation of the paired differences, for example `statistics.stdev` of
            those of a pilot study.
        power: The probability of detecting the difference, in (0, 1).
        alpha: The significance level, in (0, 1).

    Returns:
        The smallest sufficient number of pairs, at least 2, by the noncentral t distribution
        (Cohen 1988).

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If `difference` is 0 or negligible compared with `std`, or an argument is out
            of range.
        ImportError: If SciPy is not installed.

    Example:
        >>> seeds_needed(0.005, std=0.01)
        34
    """
    power, alpha = check_share("power", power), check_share("alpha", alpha)
    difference = scalars.real("difference", difference, "finite and not 0")
    std = scalars.real("std", std, "finite and not negative")
    if not (math.isfinite(difference) and difference != 0):
        raise ValueError(f"`difference` must be finite and not 0, got {difference}.")
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"`std` must be finite and not negative, got {std}.")
    if std == 0:
        return 2
    effect = min(abs(difference) / std, 1e100)  # its square is still a finite float
    if effect < 1e-100:
        raise ValueError(
            f"`difference` must be at least 1e-100 of `std`, got {difference} and {std}. No number "
            f"of seeds detects a difference this small."
        )
    return pairs_needed(effect, power, alpha)
