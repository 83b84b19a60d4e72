"""Forgetting events: `drophot.tracking` under the name that papers use."""

from drophot.tracking.forgetting import ForgettingTracker as ForgettingTracker
