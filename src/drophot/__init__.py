"""Find the training samples that matter, train on those, prune, and see what it cost."""

import logging

from drophot._modes import Scored
from drophot.coreset import Coreset, Stratified, facility_location, k_center, select
from drophot.crest import CrestLoader
from drophot.dynamics import DynamicsTracker
from drophot.epochwise import FreshSubset, LossSampling
from drophot.features import features
from drophot.forgetting import ForgettingTracker
from drophot.grid import Grid
from drophot.indexing import IndexedDataset
from drophot.pipeline import DropHot
from drophot.prune import Masks, magnitude_prune, summary
from drophot.records import Record
from drophot.training import evaluate, fit

__version__ = "0.1.0.dev0"

__all__ = [
    "Coreset",
    "CrestLoader",
    "DropHot",
    "DynamicsTracker",
    "ForgettingTracker",
    "FreshSubset",
    "Grid",
    "IndexedDataset",
    "LossSampling",
    "Masks",
    "Record",
    "Scored",
    "Stratified",
    "evaluate",
    "facility_location",
    "features",
    "fit",
    "k_center",
    "magnitude_prune",
    "select",
    "summary",
]

logging.getLogger("drophot").addHandler(logging.NullHandler())
