"""Statistics of runs over seeds: intervals, paired tests, sample sizes, and stable selections."""

from drophot.stats.comparison import Comparison, Measure, compare
from drophot.stats.paired_tests import Estimate, Paired, estimate, holm, paired
from drophot.stats.sample_size import seeds_needed
from drophot.stats.stability import Stability, stability

__all__ = [
    "Comparison",
    "Estimate",
    "Measure",
    "Paired",
    "Stability",
    "compare",
    "estimate",
    "holm",
    "paired",
    "seeds_needed",
    "stability",
]
