"""The power of the paired t-test, and SciPy's distributions."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np


def scipy_distributions() -> Any:
    """`scipy.stats`, or an error that says how to install it."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            'Statistics need SciPy, which is not installed: pip install "drophot[stats]"'
        ) from error
    return stats


def pairs_needed(effect: float, power: float, alpha: float) -> int:
    """The least number of pairs, at least 2, with which an effect is detected with this power.

    `effect` is the mean difference over the standard deviation of the differences, from 1e-100.
    """
    stats = scipy_distributions()
    t, nct, chi2 = stats.t, stats.nct, stats.chi2
    normal = NormalDist()
    z = -normal.inv_cdf(alpha / 2)
    # Negative if chance alone detects it this often; the search then ends at 2.
    roughly = (max(0.0, z + normal.inv_cdf(power)) / effect) ** 2
    if roughly > 1e6:
        # The search cannot resolve this many digits. Guenther's correction for the t-test (Sample
        # size formulas for normal theory T tests, 1981) is accurate to 1 / n.
        return math.ceil(roughly + z**2 / 2)

    def enough(n: int) -> bool:
        shift, critical = effect * math.sqrt(n), t.isf(alpha / 2, n - 1)
        if shift > 1e3:
            # SciPy's noncentral t is wrong or nan from about 1e5. The normal part is negligible
            # here; only the estimated spread matters.
            return chi2.cdf((n - 1) * (shift / critical) ** 2, n - 1) >= power
        with np.errstate(divide="ignore", invalid="ignore"):  # SciPy 1.12 warns, but is correct
            return nct.sf(critical, n - 1, shift) >= power

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
