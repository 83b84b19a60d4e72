"""Structured pruning: remove channels, so that a network is smaller and faster."""

from drophot.structured.channel_pruning import Change, Pruned, prune_channels, rebuild

__all__ = [
    "Change",
    "Pruned",
    "prune_channels",
    "rebuild",
]
