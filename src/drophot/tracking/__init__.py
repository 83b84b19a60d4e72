"""Track every sample through training."""

from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.forgetting import ForgettingTracker
from drophot.tracking.sequence_losses import sequence_losses
from drophot.tracking.sequence_scores import FirstLearned, Last, MovingAverage
from drophot.tracking.statistics import Score, Spread
from drophot.tracking.window_statistics import DUAL, TDDS, WindowSpread

__all__ = [
    "DUAL",
    "TDDS",
    "DynamicsTracker",
    "FirstLearned",
    "ForgettingTracker",
    "Last",
    "MovingAverage",
    "Score",
    "Spread",
    "WindowSpread",
    "sequence_losses",
]
