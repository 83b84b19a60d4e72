"""Structured pruning: remove channels, so that a network is smaller and faster."""

from drophot.structured.channel_pruning import Change, Pruned, prune_channels, rebuild
from drophot.structured.operator_call import OperatorCall

__all__ = [
    "Change",
    "OperatorCall",
    "Pruned",
    "prune_channels",
    "rebuild",
]
