"""Structured pruning: remove channels, so that a network is smaller and faster.

The module `channel_pruning` explains how a network is pruned, step by step.
"""

from drophot._core.budget import Budget
from drophot.structured.channel_plan import ChannelPlan, plan_channels
from drophot.structured.channel_pruning import prune_channels
from drophot.structured.operator_call import OperatorCall
from drophot.structured.pruning_result import Change, Pruned
from drophot.structured.rebuild import rebuild

__all__ = [
    "Budget",
    "Change",
    "ChannelPlan",
    "OperatorCall",
    "Pruned",
    "plan_channels",
    "prune_channels",
    "rebuild",
]
