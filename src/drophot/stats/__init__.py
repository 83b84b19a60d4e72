"""Statistics of runs: intervals, paired tests, sample sizes, stable selections, lost samples."""

from drophot.stats.comparison import Comparison, Measure, compare
from drophot.stats.forgotten import Forgotten, forgotten_by_pruning
from drophot.stats.paired_tests import Estimate, Paired, estimate, holm, paired
from drophot.stats.sample_size import seeds_needed
from drophot.stats.stability import Stability, stability

__all__ = [
    "Comparison",
    "Estimate",
    "Forgotten",
    "Measure",
    "Paired",
    "Stability",
    "compare",
    "estimate",
    "forgotten_by_pruning",
    "holm",
    "paired",
    "seeds_needed",
    "stability",
]
