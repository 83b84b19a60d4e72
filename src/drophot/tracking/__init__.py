"""Track every sample through training."""

from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.forgetting import ForgettingTracker
from drophot.tracking.statistics import Score, Spread

__all__ = [
    "DynamicsTracker",
    "ForgettingTracker",
    "Score",
    "Spread",
]
