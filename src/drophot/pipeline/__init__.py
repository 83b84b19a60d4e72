"""The paper's five steps: score, select, train, prune, fine-tune."""

from drophot.pipeline.drophot import DropHot

__all__ = [
    "DropHot",
]
