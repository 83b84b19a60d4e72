"""Forgetting events: `drophot.tracking` by the name that papers use."""

from drophot.tracking.forgetting import ForgettingTracker as ForgettingTracker
