"""The paper's five steps: score, select, train, prune, fine-tune."""

from drophot.pipeline.drophot import DropHot
from drophot.pipeline.modes import Adaptive, Scored
from drophot.pipeline.protocol import RunProtocol

__all__ = [
    "Adaptive",
    "DropHot",
    "RunProtocol",
    "Scored",
]
