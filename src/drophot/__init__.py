"""Find the training samples that matter, train on those, prune, and see what it cost."""

import logging

from drophot.coreset import select
from drophot.dynamics import DynamicsTracker
from drophot.forgetting import ForgettingTracker
from drophot.grid import Grid
from drophot.indexing import IndexedDataset
from drophot.pipeline import DropHot
from drophot.prune import Masks, magnitude_prune, summary
from drophot.records import Record
from drophot.training import evaluate, fit

__version__ = "0.1.0.dev0"

__all__ = [
    "DropHot",
    "DynamicsTracker",
    "ForgettingTracker",
    "Grid",
    "IndexedDataset",
    "Masks",
    "Record",
    "evaluate",
    "fit",
    "magnitude_prune",
    "select",
    "summary",
]

logging.getLogger("drophot").addHandler(logging.NullHandler())
