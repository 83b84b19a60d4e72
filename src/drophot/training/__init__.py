"""The training loop, and the accuracy it leads to."""

from drophot.data.batching import batches
from drophot.data.cache import Cache, in_memory
from drophot.data.samples import first_sample
from drophot.training.loop import Fit, evaluate, fit

__all__ = [
    "Cache",
    "Fit",
    "batches",
    "evaluate",
    "first_sample",
    "fit",
    "in_memory",
]
