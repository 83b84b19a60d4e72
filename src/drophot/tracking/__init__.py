"""Follow every sample through training."""

from drophot.tracking.dynamics import DynamicsTracker
from drophot.tracking.forgetting import ForgettingTracker

__all__ = [
    "DynamicsTracker",
    "ForgettingTracker",
]
