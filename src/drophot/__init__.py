"""Find the training samples that matter, train on them, prune, and measure what it cost."""

import logging as _logging
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from drophot.coreset import Coreset, Stratified, facility_location, features, k_center, select
from drophot.data import IndexedDataset
from drophot.grid import Grid
from drophot.pipeline import Adaptive, DropHot, Scored
from drophot.prune import Masks, magnitude_prune, summary
from drophot.records import Record
from drophot.sampling import AdaptiveSubset, CrestLoader, FreshSubset, LossSampling
from drophot.tracking import DynamicsTracker, ForgettingTracker
from drophot.training import evaluate, fit

if TYPE_CHECKING:
    from drophot import forgetting, integrations, models, report, stats, structured

__version__ = "0.1.0.dev0"

__all__ = [
    "Adaptive",
    "AdaptiveSubset",
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
    "forgetting",
    "integrations",
    "k_center",
    "magnitude_prune",
    "models",
    "report",
    "select",
    "stats",
    "structured",
    "summary",
]

# Imported when they are first used, so that `import drophot` stays light.
_LAZY = {"forgetting", "integrations", "models", "report", "stats", "structured"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return _import_module(f"drophot.{name}")
    raise AttributeError(f"module 'drophot' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


del TYPE_CHECKING


_logging.getLogger("drophot").addHandler(_logging.NullHandler())
